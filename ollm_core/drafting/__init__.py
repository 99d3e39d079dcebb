"""Drafting: draft sources, and how many tokens are worth drafting."""
