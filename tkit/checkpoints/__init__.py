"""Checkpoints in, checkpoints out: the safetensors reader, the one conversion loop, rank files, and the way back."""
