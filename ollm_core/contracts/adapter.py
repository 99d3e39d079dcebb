"""The contract of a model family: what an adapter declares."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ollm_core.contracts.kv import CacheKind
from ollm_core.contracts.model import Capability, CatalogEntry, Config, Layout
from ollm_core.contracts.tensors import WeightPlan

ADAPTER_API = "1.0"
"""The adapter contract that this core speaks. Another major is refused, a newer minor is warned
of.
"""


class ModelAdapter(ABC):
    """What a plugin provides for one model family. Pure declarations: no torch is needed to read
    them.
    """

    name: str
    """Short and unique, for instance `llama`."""
    adapter_api: str = ADAPTER_API
    model_types: tuple[str, ...]
    """The `model_type` values in config.json that this adapter opens."""
    quantizations: tuple[str, ...] = ()
    """The values of `quant_method` in config.json's `quantization_config` whose checkpoints it
    opens. A checkpoint with another is refused before `layout` is asked.
    """
    claims_rest: bool = False
    """Whether it opens every model whose `model_type` no adapter names. Of several that claim the
    rest, the first does.
    """
    unstated_dtype: str = ""
    """What the family's checkpoints hold where config.json states no dtype, for instance
    `bfloat16`. Only for plans of models that are not on disk.
    """

    def for_model(self, config: Config) -> ModelAdapter:
        """The adapter that answers for the model of a config.json: itself, or one that is made for
        this model and has looked at it. Raises ConfigError or UnsupportedError.
        """
        return self

    @property
    def capabilities(self) -> Mapping[str, Capability]:
        """Ability name to what is supported. Names: see docs/adapters.md. Missing means full."""
        return {}

    def catalog(self) -> Sequence[CatalogEntry]:
        """Models that can be named by id. The configs are the real ones, so that planning works
        offline.
        """
        return ()

    def text_config(self, config: Config) -> Config:
        """The part of config.json that describes the language model, as transformers' AutoConfig
        takes it: what every other declaration is given. Default: the config itself.
        """
        return config

    @abstractmethod
    def layout(self, config: Config) -> Layout:
        """Where the parts sit in the transformers module tree. Raises ConfigError for a config it
        cannot open.
        """

    def built_model(self, config: Config, dtype: Any) -> Any | None:
        """transformers' model of `config` on the meta device in `dtype`, which was built to be
        looked at, as `empty_model` builds it with eager attention. It is the caller's from here on.
        None, the default: core builds one. Asked for layouts with `own_forward` alone.
        """
        return None

    @abstractmethod
    def weights(self, config: Config, tensor_names: Iterable[str]) -> WeightPlan:
        """Which checkpoint tensors make which parameter. Pure data; raises CheckpointError for a
        foreign tensor. `tensor_names` are those of decoded tensors, whatever form they are stored
        in.
        """

    @abstractmethod
    def caches(self, config: Config) -> Sequence[CacheKind]:
        """What each layer remembers, in layer order."""

    def tensors(
        self, config: Config, shapes: Mapping[str, tuple[int, ...]], dtype: str
    ) -> Mapping[str, tuple[str, tuple[int, ...]]] | None:
        """What the checkpoint of `config` holds, so that it can be planned without its files:
        safetensors dtype and shape of each tensor that `weights` does not ignore, decoded where a
        codec encodes it.

        `shapes` are those of the parameters in the transformers module tree, `dtype` is the one
        that the config states, as safetensors names it. None, the default: not known.
        """
        return None

    @abstractmethod
    def tiny_config(self) -> Config:
        """A small config that has every feature of the family, for tests with random weights."""
