"""The reference engine: a written checkpoint, run by transformers and torch, on CPU or CUDA."""

import gc

# Importing torch and transformers makes a million objects that live to the end; with Python's own threshold of 700, a
# quarter of that import's 3.7 CPU seconds goes into looking for garbage among them.
gc.set_threshold(200_000)
