"""The reference engine: a written checkpoint, run by transformers and torch, on CPU or CUDA."""

import os

# one bar per loaded model says nothing that tkit's own progress does not; read when transformers is first imported
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
