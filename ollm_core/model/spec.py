"""What a model is made of, known before any weight is read: a run and a plan start from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ollm_core.checkpoint.safetensors import Checkpoint
from ollm_core.checkpoint.synthetic import describe_checkpoint
from ollm_core.contracts.adapter import ModelAdapter
from ollm_core.contracts.kv import CacheKind, KVGeometry
from ollm_core.contracts.model import Config
from ollm_core.contracts.tensors import TORCH_NAMES
from ollm_core.device.dtypes import DTYPES
from ollm_core.device.memory import DeviceMemory, memory_of
from ollm_core.errors import ConfigError
from ollm_core.files.untrusted_json import show
from ollm_core.model.own_skeleton import OwnSkeleton
from ollm_core.model.skeleton import Skeleton
from ollm_core.plugins.limited import LimitedAdapter
from ollm_core.plugins.loader import Offer
from ollm_core.plugins.registry import check_quantization
from ollm_core.plugins.validation import kinds_of, layout_of, plan_of, text_config_of
from ollm_core.products.select import choose_products
from ollm_core.weights.formats.codecs import LogicalTensors, as_stored, quantized
from ollm_core.weights.tied_head import untie_head
from ollm_core.weights.units import PLAIN_FLOATS, Units, cut_units

_FLOATS = {name: TORCH_NAMES[name] for name in PLAIN_FLOATS}


@dataclass(frozen=True, slots=True, eq=False)
class ModelSpec:
    """One model on one device, which need not be here."""

    adapter: ModelAdapter
    config: Config
    """Of the language model."""
    checkpoint: Checkpoint
    dtype: torch.dtype
    device: torch.device
    kinds: tuple[CacheKind, ...]
    skeleton: Skeleton
    units: Units
    memory: DeviceMemory
    """That of `device`."""

    @property
    def geometry(self) -> KVGeometry:
        """The shape of keys and values."""
        return KVGeometry(self.kinds, self.dtype, self.device)


def inspect_model(
    adapter: ModelAdapter,
    whole_config: Config,
    checkpoint: Checkpoint | None,
    codecs: Mapping[str, Offer],
    *,
    dtype: str,
    device: torch.device,
    where: Path,
    precision: str = "exact",
    bare: bool = False,
    memory: DeviceMemory | None = None,
) -> ModelSpec:
    """The spec of the model of a config.json. `where` that came from is for messages.

    Without a `checkpoint`, one is described as the adapter declares it. `bare` allocates nothing on
    `device`, which then need not be there. `memory` is by default as `memory_of` says. Raises
    ConfigError, CheckpointError, UnsupportedError.
    """
    config = text_config_of(adapter, whole_config)
    declared: Config = {**config, **whole_config}
    check_quantization(adapter, declared, str(where))
    if checkpoint is None:
        known = declared.get("dtype") or declared.get("torch_dtype") or adapter.unstated_dtype
        declared = {**declared, "dtype": known or (None if dtype == "auto" else dtype)}
    stated = declared.get("quantization_config")
    shown = config if stated is None else {**config, "quantization_config": stated}
    tensors = None if checkpoint is None else LogicalTensors(checkpoint, shown, codecs)
    if tensors is not None:
        tensors.check_device(device)
    indexed = checkpoint.index_dtype if checkpoint else None
    compute_dtype = _compute_dtype(dtype, declared, where, tensors, indexed)
    layout = layout_of(adapter, config)
    place = torch.device("meta") if bare else device
    skeleton: Skeleton
    products = choose_products(compute_dtype, device, precision)
    if layout.own_forward:
        model = adapter.built_model(config, compute_dtype)
        skeleton = own = OwnSkeleton(config, layout, compute_dtype, place, products, model)
        kinds = own.kinds
        adapter = LimitedAdapter(adapter, own.limits)
    else:
        kinds = kinds_of(adapter, config, layout)
        skeleton = Skeleton(config, layout, compute_dtype, place, products)
    if checkpoint is None or tensors is None:
        stored = str(declared["dtype"])
        checkpoint = describe_checkpoint(
            adapter,
            config,
            skeleton.shapes,
            stored,
            where,
            lambda forms: as_stored(shown, forms, codecs),
        )
        tensors = LogicalTensors(checkpoint, shown, quantized(codecs))
        plan = plan_of(adapter, config, tensors.names)
    else:
        plan = plan_of(adapter, config, tensors.names)
        plan = untie_head(plan, adapter, config, layout, checkpoint, tensors, compute_dtype)
    units = cut_units(
        layout,
        tensors.compose(plan, skeleton.shapes, compute_dtype),
        checkpoint.tensors,
        skeleton.shapes,
        # In float32, matrix libraries give other last bits for a part of the rows.
        slice_head=compute_dtype != torch.float32,
        kept_dtypes=skeleton.kept_dtypes,
        outer=skeleton.outer,
    )
    return ModelSpec(
        adapter,
        config,
        checkpoint,
        compute_dtype,
        device,
        kinds,
        skeleton,
        units,
        memory or memory_of(device),
    )


def _compute_dtype(
    dtype: str, config: Config, directory: Path, tensors: LogicalTensors | None, indexed: object
) -> torch.dtype:
    """What transformers computes in by default: as config.json says, else as the index does
    (`indexed`), else the dtype of the first tensor of floats that it comes upon.
    """
    if dtype != "auto":
        return DTYPES[dtype]
    stated = config.get("dtype") or config.get("torch_dtype") or indexed
    if stated is None and tensors is not None:
        stated = next((_FLOATS[name] for name in tensors.dtypes() if name in _FLOATS), None)
    if stated is None:
        raise ConfigError(
            f"{directory}: no dtype in config.json and no float tensor in the checkpoint",
            hint="give dtype, for instance bfloat16",
        )
    if not isinstance(stated, str) or stated not in DTYPES:
        raise ConfigError(
            f"{directory}: the model's dtype is {show(stated)}, need {', '.join(DTYPES)}",
            hint="give dtype, for instance float32",
        )
    return DTYPES[stated]
