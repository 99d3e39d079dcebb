"""Checkpoints written again in another form."""
