"""Routed experts: which are kept, and reading the others when a layer wants them."""
