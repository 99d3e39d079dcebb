"""Converts checkpoints: to compressed weights, and from GGUF."""
