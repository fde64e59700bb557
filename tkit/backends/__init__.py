"""The ways an engine can be run: what each needs on this machine and how Triton serves it."""
