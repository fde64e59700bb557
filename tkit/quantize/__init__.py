"""Tensors in, tensors out. Knows no model, file or rank."""
