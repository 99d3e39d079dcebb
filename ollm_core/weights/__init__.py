"""Weights: units, where they are placed, and how they arrive."""
