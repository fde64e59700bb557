"""Where torch computes."""

from __future__ import annotations

DEVICES = ("auto", "cpu", "cuda")  # auto: on CUDA where torch sees a GPU, the first that CUDA_VISIBLE_DEVICES leaves
