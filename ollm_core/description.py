"""A checkpoint that is not there, described: which tensors its files would hold, and where.

It is laid out as transformers saves it into one file, so that a plan without the files counts the
very pages that a run with them would read. Torch is imported only to try transforms.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import permutations
from math import prod
from pathlib import Path
from types import MappingProxyType

from ollm_core.checkpoint import SINGLE_FILE, Checkpoint
from ollm_core.errors import ConfigError, UnsupportedError
from ollm_core.interfaces import ModelAdapter
from ollm_core.types import DTYPE_BYTES, Config, ParameterSource, TensorInfo

STORED_DTYPES = MappingProxyType({"float32": "F32", "float16": "F16", "bfloat16": "BF16"})
"""safetensors dtype names of the dtypes that a config.json may state."""

Shape = tuple[int, ...]


def describe_checkpoint(
    adapter: ModelAdapter,
    config: Config,
    shapes: Mapping[str, Shape],
    dtype: str,
    where: Path,
) -> Checkpoint:
    """The checkpoint that `adapter` declares for its text `config`.

    `shapes` are those of the parameters in the transformers module tree, `dtype` is config.json's.
    Raises ConfigError for another dtype, UnsupportedError if the adapter does not say enough.
    """
    if dtype not in STORED_DTYPES:
        raise ConfigError(
            f"{where}: no dtype in config.json, so the size of its weights is not known",
            hint="give dtype, for instance bfloat16",
        )
    stored = adapter.tensors(config, shapes, STORED_DTYPES[dtype])
    if stored is None:
        raise UnsupportedError(
            f"adapter {adapter.name} does not say what its checkpoints hold",
            hint="plan a directory that holds the model's weights; an adapter says it by tensors()",
        )
    # As the library of the format does: the largest elements first, then by name.
    order = sorted(stored, key=lambda name: (-DTYPE_BYTES[stored[name][0]], name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        kind, shape = stored[name]
        begin, end = end, end + prod(shape) * DTYPE_BYTES[kind]
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [begin, end]}
    place = 8 + -(-len(json.dumps(header, separators=(",", ":"), ensure_ascii=False)) // 8) * 8
    tensors: dict[str, TensorInfo] = {}
    path = where / SINGLE_FILE  # one object: there may be 70,000 tensors
    for name in order:
        kind, shape = stored[name]
        num_bytes = prod(shape) * DTYPE_BYTES[kind]
        tensors[name] = TensorInfo(name, kind, shape, path, place, num_bytes)
        place += num_bytes
    return Checkpoint(where, MappingProxyType(tensors), MappingProxyType({}))


def infer_tensors(
    source: ParameterSource,
    shape: Shape,
    dtype: str,
    num_rows: int,
    tried: dict[object, Shape | None],
) -> Iterator[tuple[str, tuple[str, Shape]]]:
    """Name, dtype and shape of the tensors of `source`, which makes a parameter of `shape`, or a
    slice of one from a row of tensors with `num_rows`.

    What it says of them is believed. Otherwise a transform is tried without data on equal parts of
    the parameter, cut along each dimension, and turned; the first that give its shape are taken.
    `tried` remembers. Raises UnsupportedError.
    """
    rows = () if source.row is None else (num_rows,)
    if source.stored:
        for name, form in zip(source.tensors, source.stored, strict=True):
            yield name, (form.dtype, (*rows, *form.shape))
        return
    part: Shape | None = shape
    if source.transform is not None:
        key = source.transform, len(source.tensors), shape
        if key not in tried:
            tried[key] = next(_parts(source, shape), None)
        part = tried[key]
    if part is None or (source.transform is None and len(source.tensors) > 1):
        raise UnsupportedError(
            f"what is stored for {source.tensors[0]} cannot be told from config.json",
            hint="plan a directory that holds the weights; source() or experts() of the adapter "
            "can say what is `stored`",
        )
    for name in source.tensors:
        yield name, (dtype, (*rows, *part))


def _parts(source: ParameterSource, shape: Shape) -> Iterator[Shape]:
    """Shapes of equal tensors from which the transform makes `shape`."""
    import torch

    assert source.transform is not None, "asked for a transform only"
    number = len(source.tensors)
    for dim in range(len(shape)):
        if shape[dim] % number:
            continue
        cut = (*shape[:dim], shape[dim] // number, *shape[dim + 1 :])
        for turned in permutations(cut):
            empty = [torch.empty(turned, device="meta") for _ in range(number)]
            try:
                made = source.transform(*empty)
            except Exception:  # noqa: BLE001 - not with these shapes; an adapter may raise anything
                continue
            if isinstance(made, torch.Tensor) and tuple(made.shape) == shape:
                yield turned
