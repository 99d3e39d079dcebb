"""GGUF files: what one says, and that all of it is in the model that transformers makes of it."""
