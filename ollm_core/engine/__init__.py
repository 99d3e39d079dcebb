"""The engine: one weight pass over many sequences."""
