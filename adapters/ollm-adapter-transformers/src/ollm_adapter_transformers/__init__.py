"""Any decoder-only architecture of the installed transformers, recognised from its config and its
module tree.
"""

from __future__ import annotations

from collections.abc import Sequence

from ollm_adapter_transformers.catalog import entries
from ollm_adapter_transformers.family import FamilyAdapter
from ollm_core import CatalogEntry, Config, ModelAdapter, hookimpl

__all__ = ["FamilyAdapter", "TransformersAdapter"]


class TransformersAdapter(FamilyAdapter):
    """Claims every `model_type` that no other adapter does."""

    name = "transformers"
    model_types = ()
    claims_rest = True

    def tiny_config(self) -> Config:
        """One of many: a dense decoder with learned positions and biases, which no family adapter
        opens.
        """
        return {
            "model_type": "gpt2",
            "vocab_size": 256,
            "n_embd": 64,
            "n_layer": 3,
            "n_head": 4,
            "n_positions": 512,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }


@hookimpl
def ollm_adapters() -> Sequence[ModelAdapter]:
    """The one adapter of this distribution."""
    return (TransformersAdapter(),)


@hookimpl
def ollm_catalog() -> Sequence[CatalogEntry]:
    """The models that people ask for most; whichever adapter claims one opens it."""
    return entries()
