"""Checkpoints on disk: their files, tensors and config, and where models lie."""
