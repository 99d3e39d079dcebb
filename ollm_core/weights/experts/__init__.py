"""Routed experts: which stay resident, and how the others are read when a layer wants them."""
