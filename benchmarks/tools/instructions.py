"""Limits a process to AVX2, so that a larger processor stands for an ordinary one."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

AVX2: Mapping[str, str] = MappingProxyType(
    {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "NUMBA_CPU_NAME": "haswell",
    }
)
"""Environment in which torch, its libraries and numba use nothing beyond AVX2. A program that is
compiled beforehand must be compiled for it.
"""
