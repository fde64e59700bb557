"""The reference engine: a written checkpoint, run by transformers and torch, on CPU or CUDA."""

import atexit
import gc
import os

# Importing torch and transformers makes a million objects that live to the end; with Python's own threshold of 700, a
# quarter of that import's 3.7 CPU seconds goes into looking for garbage among them.
gc.set_threshold(200_000)
atexit.register(gc.freeze)  # nor does the interpreter's end look for any: 1.3 CPU seconds

# OpenMP's threads spin while they wait, for the next product and for each other: on a busy machine that was two thirds of
# a build's CPU seconds. Read once, when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
