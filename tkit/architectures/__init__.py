"""Hugging Face architectures: which tensors they hold and where each goes. Tables and shapes only; no torch, no files."""
