"""Describes a checkpoint that is not on disk, for plans: which tensors its files would hold, and
where.

It is laid out as transformers saves it into one file, so that a plan without the files counts the
very pages that a run with them would read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from types import MappingProxyType

from ollm_core.checkpoint.safetensors import SINGLE_FILE, Checkpoint
from ollm_core.contracts.adapter import ModelAdapter
from ollm_core.contracts.model import Config
from ollm_core.contracts.tensors import DTYPE_BYTES, TORCH_NAMES, TensorInfo
from ollm_core.errors import ConfigError, UnsupportedError
from ollm_core.plugins.infer import Shape
from ollm_core.values import DTYPES

STORED_DTYPES = MappingProxyType(
    {dtype: name for name, dtype in TORCH_NAMES.items() if dtype in DTYPES}
)
"""safetensors dtype names of the dtypes that a config.json may state."""
Forms = Mapping[str, tuple[str, Shape]]
"""safetensors dtype name and shape of tensors, by name."""


def describe_checkpoint(
    adapter: ModelAdapter,
    config: Config,
    shapes: Mapping[str, Shape],
    dtype: str,
    where: Path,
    as_stored: Callable[[Forms], Forms],
) -> Checkpoint:
    """The checkpoint that `adapter` declares for its text `config`, its tensors `as_stored`.

    `shapes` are those of the parameters in the transformers module tree, `dtype` is config.json's.
    Raises ConfigError for another dtype, UnsupportedError if the adapter does not say enough.
    """
    if dtype not in STORED_DTYPES:
        raise ConfigError(
            f"{where}: no dtype in config.json, so the size of its weights is not known",
            hint="give dtype, for instance bfloat16",
        )
    declared = adapter.tensors(config, shapes, STORED_DTYPES[dtype])
    if declared is None:
        raise UnsupportedError(
            f"adapter {adapter.name} does not say what its checkpoints hold",
            hint="plan a directory that holds the model's weights; an adapter says it by tensors()",
        )
    stored = as_stored(declared)
    # As the library of the format does: the largest elements first, then by name.
    order = sorted(stored, key=lambda name: (-DTYPE_BYTES[stored[name][0]], name))
    length = len('{"__metadata__":{"format":"pt"}}')
    end = 0
    for name in order:  # told without being built: of 70,000 tensors that takes seconds
        kind, shape = stored[name]
        begin, end = end, end + prod(shape) * DTYPE_BYTES[kind]
        sizes = ",".join(map(str, shape))
        length += len(json.dumps(name, ensure_ascii=False)) + len(
            f',:{{"dtype":"{kind}","shape":[{sizes}],"data_offsets":[{begin},{end}]}}'
        )
    place = 8 + -(-length // 8) * 8
    tensors: dict[str, TensorInfo] = {}
    path = where / SINGLE_FILE  # one object: there may be 70,000 tensors
    for name in order:
        kind, shape = stored[name]
        num_bytes = prod(shape) * DTYPE_BYTES[kind]
        tensors[name] = TensorInfo(name, kind, shape, path, place, num_bytes)
        place += num_bytes
    return Checkpoint(where, MappingProxyType(tensors), MappingProxyType({}))
