"""An adapter as it answers for one model, of which more is known than of its family."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from ollm_core.contracts.adapter import ModelAdapter
from ollm_core.contracts.kv import CacheKind
from ollm_core.contracts.model import Capability, CatalogEntry, Config, Layout
from ollm_core.contracts.tensors import WeightPlan


class LimitedAdapter(ModelAdapter):
    """`adapter`, with `limits` beside the capabilities that it declares itself."""

    def __init__(self, adapter: ModelAdapter, limits: Mapping[str, Capability]) -> None:
        self.name = adapter.name
        self.model_types = adapter.model_types
        self.quantizations = adapter.quantizations
        self.unstated_dtype = adapter.unstated_dtype
        self._adapter = adapter
        self._limits = dict(limits)

    @property
    def capabilities(self) -> Mapping[str, Capability]:
        return {**self._limits, **self._adapter.capabilities}

    def catalog(self) -> Sequence[CatalogEntry]:
        return self._adapter.catalog()

    def text_config(self, config: Config) -> Config:
        return self._adapter.text_config(config)

    def layout(self, config: Config) -> Layout:
        return self._adapter.layout(config)

    def weights(self, config: Config, tensor_names: Iterable[str]) -> WeightPlan:
        return self._adapter.weights(config, tensor_names)

    def caches(self, config: Config) -> Sequence[CacheKind]:
        return self._adapter.caches(config)

    def tensors(
        self, config: Config, shapes: Mapping[str, tuple[int, ...]], dtype: str
    ) -> Mapping[str, tuple[str, tuple[int, ...]]] | None:
        return self._adapter.tensors(config, shapes, dtype)

    def tiny_config(self) -> Config:
        return self._adapter.tiny_config()
