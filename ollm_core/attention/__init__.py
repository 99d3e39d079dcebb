"""Attention: exact, blockwise, and the kernels that blockwise attention runs on."""
