"""Stored forms of weights, and how they become parameters."""
