"""tkit: from a Hugging Face checkpoint to a proven TensorRT-LLM deployment."""

__version__ = "0.1.0"
