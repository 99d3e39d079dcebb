"""Models of transformers' own architectures for oLLM."""

from __future__ import annotations

from collections.abc import Sequence

from ollm_adapter_transformers.catalog import entries
from ollm_core import CatalogEntry, hookimpl


@hookimpl
def ollm_catalog() -> Sequence[CatalogEntry]:
    """The models that people ask for most; whichever adapter claims one opens it."""
    return entries()
