"""Weights: what is read together, where it is kept, and how it arrives."""
