"""Attention: exact, block by block, and the kernels that compute it."""
