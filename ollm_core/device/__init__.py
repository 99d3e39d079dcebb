"""The device that computes: which one, buffers, and transfers to one with memory of its own."""
