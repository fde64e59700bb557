"""The OpenAI front: HTTP in, Triton gRPC out. Knows a URL, a tokenizer directory and nothing of who started it."""
