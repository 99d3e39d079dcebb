"""Any decoder-only architecture of the installed transformers, recognised from its config and its
module tree.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ollm_adapter_transformers.catalog import entries
from ollm_adapter_transformers.recognise import check_config, is_composite, language_config
from ollm_core import (
    CacheKind,
    CatalogEntry,
    Config,
    Layout,
    ModelAdapter,
    WeightPlan,
    hookimpl,
)

if TYPE_CHECKING:
    from ollm_adapter_transformers.tree import Tree


class TransformersAdapter(ModelAdapter):
    """Claims every `model_type` that no other adapter does. What core finds that a model cannot do
    is declared for that model when it is opened.
    """

    name = "transformers"
    model_types = ()
    claims_rest = True
    is_part = False
    """Whether the language model is a part of what the checkpoint holds."""

    def for_model(self, config: Config) -> ModelAdapter:
        """The adapter of one model: what it builds to look at is built once."""
        check_config(config)
        dtype = config.get("dtype") or config.get("torch_dtype")
        return OneModel(is_part=is_composite(config), dtype=str(dtype or ""))

    def text_config(self, config: Config) -> Config:
        """The language model's part."""
        check_config(config)
        return language_config(config)

    def layout(self, config: Config) -> Layout:
        """As the module tree has it."""
        return self._tree(config).layout

    def weights(self, config: Config, tensor_names: Iterable[str]) -> WeightPlan:
        """As transformers converts a checkpoint."""
        from ollm_adapter_transformers.stored import plan_weights

        return plan_weights(self._tree(config), tuple(tensor_names), is_part=self.is_part)

    def caches(self, config: Config) -> Sequence[CacheKind]:
        """As transformers makes them: core sees them."""
        return ()

    def tensors(
        self, config: Config, shapes: Mapping[str, tuple[int, ...]], dtype: str
    ) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        """As transformers saves a model."""
        from ollm_adapter_transformers.stored import saved_tensors

        return saved_tensors(self._tree(config), dtype)

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

    def _tree(self, config: Config) -> Tree:
        import torch

        from ollm_adapter_transformers.tree import build_tree

        stated = config.get("dtype") or config.get("torch_dtype") or self.unstated_dtype
        dtype = getattr(torch, str(stated), None)
        return build_tree(config, dtype if isinstance(dtype, torch.dtype) else torch.float32)


class OneModel(TransformersAdapter):
    """That of one model."""

    def __init__(self, *, is_part: bool, dtype: str) -> None:
        """`dtype` is that of the whole config, which a part of it may leave out."""
        self.is_part = is_part
        self.unstated_dtype = dtype
        self._given: list[Any] = []
        self._built = functools.lru_cache(maxsize=2)(self._build)

    def for_model(self, config: Config) -> ModelAdapter:
        return self

    def built_model(self, config: Config, dtype: Any) -> Any | None:
        """That of the tree, once: what it is run by changes it."""
        model = self._tree(config).model
        if model.dtype != dtype or any(one is model for one in self._given):
            return None
        self._given.append(model)
        return model

    def _tree(self, config: Config) -> Tree:
        return self._built(json.dumps(dict(config), sort_keys=True, default=str))

    def _build(self, config: str) -> Tree:
        return super()._tree(json.loads(config))


@hookimpl
def ollm_adapters() -> Sequence[ModelAdapter]:
    """The one adapter of this distribution."""
    return (TransformersAdapter(),)


@hookimpl
def ollm_catalog() -> Sequence[CatalogEntry]:
    """The models that people ask for most; whichever adapter claims one opens it."""
    return entries()
