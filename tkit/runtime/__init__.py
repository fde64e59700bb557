"""The reference engine: a written checkpoint, run by transformers and torch, on CPU or CUDA."""
