"""What an adapter is that declares no parts: a model's are seen in transformers' module tree."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ollm_adapter_transformers.recognise import (
    check_config,
    is_composite,
    language_config,
    with_numbers,
)
from ollm_core import CacheKind, Config, Layout, ModelAdapter, WeightPlan

if TYPE_CHECKING:
    from ollm_adapter_transformers.tree import Tree


_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Of tensors, as safetensors and as config.json name them."""


class FamilyAdapter(ModelAdapter):
    """A family of which nothing needs to be declared but `name`, `model_types` and `tiny_config`.
    Where its checkpoints or its module tree are not as transformers has them, three attributes say
    so. What core finds that a model cannot do is declared for that model when it is opened.
    """

    paths: Mapping[str, str] = MappingProxyType({})
    """`embedding`, `layers`, `head` or `experts` of Layout, where it is another than is seen in the
    module tree.
    """
    renamed: Mapping[str, str] = MappingProxyType({})
    """Of tensors that checkpoints call other than transformers does: a pattern of `re`, and what
    takes the place of all that it matches in the name.
    """
    ignored: Sequence[str] = ()
    """Patterns of `re`, found anywhere in the names of tensors that no parameter is made of."""
    is_part = False
    """Whether the language model is a part of what the checkpoint holds."""
    _trees: _Trees | None = None

    def for_model(self, config: Config) -> ModelAdapter:
        """The adapter of one model: what it builds to look at is built once."""
        if self._trees is not None:
            return self
        check_config(config)
        one = copy.copy(self)
        one.is_part = is_composite(config)
        one.unstated_dtype = _stated_dtype(config) or self.unstated_dtype
        one._trees = _Trees(one._seen)
        return one

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

        return plan_weights(
            self._tree(config),
            tuple(tensor_names),
            is_part=self.is_part,
            renamed=self.renamed,
            ignored=self.ignored,
        )

    def caches(self, config: Config) -> Sequence[CacheKind]:
        """As transformers makes them: core sees them."""
        return ()

    def tensors(
        self, config: Config, shapes: Mapping[str, tuple[int, ...]], dtype: str
    ) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        """As transformers saves a model."""
        from ollm_adapter_transformers.stored import saved_tensors

        stated = _DTYPES.get(dtype, "") or _stated_dtype(config)
        return saved_tensors(self._tree({**config, "dtype": stated} if stated else config), dtype)

    def built_model(self, config: Config, dtype: Any) -> Any | None:
        """That of the tree, once: what it is run by changes it."""
        return None if self._trees is None else self._trees.give(config, dtype)

    def _tree(self, config: Config) -> Tree:
        return self._seen(config) if self._trees is None else self._trees.of(config)

    def _seen(self, config: Config) -> Tree:
        import torch

        from ollm_adapter_transformers.tree import build_tree

        dtype = getattr(torch, _stated_dtype(config) or self.unstated_dtype, None)
        known = dtype if isinstance(dtype, torch.dtype) else torch.float32
        return build_tree(with_numbers(config), known, self.paths)


class _Trees:
    """The module trees that were built for one model, and which of them were given away."""

    def __init__(self, build: Any) -> None:
        self._build = build
        self._built = functools.lru_cache(maxsize=2)(lambda stated: build(json.loads(stated)))
        self._given: list[Any] = []

    def of(self, config: Config) -> Tree:
        tree: Tree = self._built(json.dumps(dict(config), sort_keys=True, default=str))
        return tree

    def give(self, config: Config, dtype: Any) -> Any | None:
        model = self.of(config).model
        if model.dtype != dtype or any(one is model for one in self._given):
            return None
        self._given.append(model)
        return model


def _stated_dtype(config: Config) -> str:
    return str(config.get("dtype") or config.get("torch_dtype") or "")
