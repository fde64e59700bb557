"""Triton Inference Server: config.pbtxt, the repository on disk, the process. Knows no engine."""
