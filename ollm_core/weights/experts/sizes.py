"""Sizes of one routed expert, in each form, and the memory that a resident one is put into."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ollm_core.device.memory import DeviceMemory
from ollm_core.weights.units import TORCH_DTYPES, Parameter, WeightUnit


def finished_bytes(unit: WeightUnit, dtype: torch.dtype) -> int:
    """Of its parameters in `dtype`."""
    return sum(parameter.num_bytes(dtype) for parameter in unit.parameters)


def made_bytes(unit: WeightUnit, dtype: torch.dtype, *, packed: bool = False) -> int:
    """The most that building holds beside the buffer, results included: parameters are made one
    after another. The buffer is as read, page for page, or `packed`.
    """
    most = made = 0
    for parameter in unit.parameters:
        made += parameter.num_bytes(dtype) if parameter.needs_copy(dtype, packed=packed) else 0
        scratch = parameter.source.scratch_bytes
        converted = _converted_bytes(parameter, dtype, packed=packed)
        # Where it is known what the transform makes, scratch is gone when that is converted.
        both = max(scratch, converted) if parameter.source.makes else scratch + converted
        most = max(most, made + both)
    return most


def _converted_bytes(parameter: Parameter, dtype: torch.dtype, *, packed: bool) -> int:
    """Bytes of a parameter in another form, from which it is then converted."""
    if made := parameter.source.makes:
        return parameter.num_bytes(TORCH_DTYPES[made]) if TORCH_DTYPES[made] != dtype else 0
    stored = [TORCH_DTYPES[tensor.dtype] for tensor in parameter.tensors]
    pairs = zip(parameter.tensors, stored, strict=True)
    unaligned = not packed and any(tensor.offset % d.itemsize for tensor, d in pairs)
    if unaligned or (parameter.source.transform and stored[0] != dtype):
        return sum(tensor.num_bytes for tensor in parameter.tensors) * (1 + unaligned)
    return 0


def fitting(old: tuple[Tensor, Sequence[int]] | None, unit: WeightUnit) -> Tensor | None:
    """The memory of what was kept before, if the unit fits it."""
    return old[0] if old and old[0].numel() == unit.packed_bytes else None


def pack(
    unit: WeightUnit,
    buffer: Tensor,
    offsets: Sequence[int],
    packed: Tensor | None,
    memory: DeviceMemory,
) -> tuple[Tensor, Sequence[int]]:
    """The bytes of a unit's tensors side by side in `packed`, or in memory of their own, and where
    each begins.
    """
    if packed is None:
        packed = memory.host_buffer(unit.packed_bytes)
    for place, part in zip(unit.packed_places, unit.parts(buffer, offsets), strict=True):
        packed[place : place + part.numel()] = part
    return packed, unit.packed_places


def owned(
    parameters: Sequence[Tensor], buffer: Tensor, old: Sequence[Tensor] | None
) -> list[Tensor]:
    """The same parameters, none of them a view of `buffer`: those that were are put into the `old`
    ones if these fit, which spares the machine new pages.
    """
    memory = buffer.untyped_storage().data_ptr()
    if old is None or not all(map(_alike, parameters, old)):
        old = None
    return [
        value
        if value.untyped_storage().data_ptr() != memory
        else value.clone()
        if old is None
        else old[i].copy_(value)
        for i, value in enumerate(parameters)
    ]


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.stride() == other.stride()
