"""Decides whether a tied head that is also stored is the embedding: only if the two are equal.

transformers compares the two when it has loaded both, in the dtype that it computes in, and does
not tie them where they differ. So does this, in pieces, and only where both are there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ollm_core.checkpoint.safetensors import Checkpoint
from ollm_core.contracts.adapter import ModelAdapter
from ollm_core.contracts.model import Config, Layout
from ollm_core.contracts.tensors import ParameterSource, TensorInfo, WeightPlan
from ollm_core.errors import OllmError, ReadError
from ollm_core.weights.formats.codecs import LogicalTensors
from ollm_core.weights.units import PLAIN_FLOATS, TORCH_DTYPES

_PIECE_BYTES = 4 << 20


def untie_head(
    plan: WeightPlan,
    adapter: ModelAdapter,
    config: Config,
    layout: Layout,
    checkpoint: Checkpoint,
    tensors: LogicalTensors,
    dtype: torch.dtype,
) -> WeightPlan:
    """`plan`, in which the head is the embedding only if the checkpoint has no other head.

    `tensors` are those of `checkpoint`, `dtype` is the one to compute in. Holds a few MB and stops
    at the first difference. A head that a transform or a codec makes is taken as it is stored, not
    compared: that gives the same, and needs no memory for both. Raises ReadError.
    """
    embedding = plan.parameters.get(f"{layout.embedding}.weight")
    head_name = f"{layout.head}.weight"
    if embedding is None or plan.parameters.get(head_name) != embedding:
        return plan
    own = _own_head(plan, adapter, config, head_name, embedding, tensors)
    if own is None:
        return plan
    head, table = (_plain(source, checkpoint, tensors) for source in (own, embedding))
    if head is not None and table is not None and _equal(head, table, dtype):
        return plan
    return replace(
        plan,
        parameters={**plan.parameters, head_name: own},
        ignored=plan.ignored - frozenset(own.tensors),
    )


def _own_head(
    plan: WeightPlan,
    adapter: ModelAdapter,
    config: Config,
    head_name: str,
    embedding: ParameterSource,
    tensors: LogicalTensors,
) -> ParameterSource | None:
    """What makes the head by itself, from tensors that `plan` does not use; None if none do."""
    names = frozenset(tensors.names)
    named = head_name in names
    if not named and not plan.ignored:
        return None
    try:
        untied = adapter.weights({**config, "tie_word_embeddings": False}, tensors.names)
        own = untied.parameters.get(head_name)
    except OllmError:  # a tensor is missing: there is no other head
        own = None
    if own is None or own == embedding:
        own = ParameterSource((head_name,)) if named else None
    free = names.difference(*(source.tensors for source in plan.sources()))
    return own if own is not None and free.issuperset(own.tensors) else None


def _plain(
    source: ParameterSource, checkpoint: Checkpoint, tensors: LogicalTensors
) -> TensorInfo | None:
    """The one tensor that `source` takes as it is stored, if it does."""
    (name, *others) = source.tensors
    if others or source.transform or source.row is not None or tensors.is_encoded(name):
        return None
    return checkpoint.tensors[name]


def _equal(one: TensorInfo, other: TensorInfo, dtype: torch.dtype) -> bool:
    """Whether both are the same parameter in `dtype`; what is not plain floats equals nothing."""
    if one.shape != other.shape or not {one.dtype, other.dtype} <= set(PLAIN_FLOATS):
        return False
    pieces = zip(_pieces(one), _pieces(other), strict=True)
    return all(torch.equal(first.to(dtype), second.to(dtype)) for first, second in pieces)


def _pieces(tensor: TensorInfo) -> Iterator[Tensor]:
    """The elements of a tensor in its file, so many at a time."""
    dtype = TORCH_DTYPES[tensor.dtype]
    piece_bytes = _PIECE_BYTES // torch.float64.itemsize * dtype.itemsize  # as many of any dtype
    buffer = bytearray(piece_bytes)
    try:
        with tensor.path.open("rb", buffering=0) as file:
            for start in range(0, tensor.num_bytes, piece_bytes):
                wanted = memoryview(buffer)[: min(piece_bytes, tensor.num_bytes - start)]
                _fill(wanted, file.fileno(), tensor, tensor.offset + start)
                yield torch.frombuffer(wanted, dtype=dtype)
    except OSError as error:
        raise ReadError(f"{tensor.path}: {error.strerror or type(error).__name__}") from error


def _fill(wanted: memoryview, file: int, tensor: TensorInfo, offset: int) -> None:
    done = 0
    while done < len(wanted):
        got = os.preadv(file, [wanted[done:]], offset + done)
        if not got:
            raise ReadError(
                f"{tensor.path}: ends within {tensor.name}", hint="open the model again"
            )
        done += got
