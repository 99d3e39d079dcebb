"""Checks of numbers at the edges of their forms, from the file to what the engine computes with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ollm_conformance.adapter.base import AdapterSuite
from ollm_conformance.checks import check, does_not_apply
from ollm_conformance.models import DTYPES
from ollm_conformance.subject import Reference, Subject
from ollm_core.testing import bound_parameters, hold_weights, open_checkpoint

_EDGES = (0, 1, 2, 126, 127, 128, 129, 240, 241, 253, 254)
_INTEGERS = {2: torch.int16, 4: torch.int32}
_SCALES = "_scales"


class Numbers(AdapterSuite):
    """Numbers that arithmetic would change."""

    @check(
        "weights.packed-edges",
        "Packed numbers of every code and sign, under scales from the smallest to the largest, are "
        "bit for bit what transformers makes of them.",
        look="weights(), experts(): transforms, of packed tensors or of what is made of them",
    )
    @pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
    def test_packed_edges(self, subject: Subject, dtype: str) -> None:
        if subject.config.get("quantization_config") is None:
            does_not_apply("the tiny model is stored in plain floats")
        directory = _changed(subject, "bfloat16", "packed", _with_edges)
        stored = open_checkpoint(directory).tensors
        packed = {name.removesuffix(_SCALES) for name in stored if name.endswith(_SCALES)}
        _check_bits(subject, directory, dtype, "packed numbers", packed.__contains__)

    @check(
        "weights.special-values",
        "Subnormal numbers, the largest finite ones, zeros of both signs and rows of zeros keep "
        "their bits, or become in another dtype what transformers makes of them.",
        look="weights(): transforms that compute with values, or take them for other dtypes",
    )
    @pytest.mark.parametrize(
        ("stored", "dtype"),
        [
            ("bfloat16", "bfloat16"),
            ("bfloat16", "float32"),
            ("float32", "float32"),
            ("float32", "bfloat16"),
        ],
    )
    def test_special_values(self, subject: Subject, stored: str, dtype: str) -> None:
        directory = _changed(subject, stored, "special", _with_specials)
        told = f"numbers stored in {stored}"
        _check_bits(subject, directory, dtype, told, lambda name: True)


def _changed(
    subject: Subject, stored: str, name: str, change: Callable[[str, Tensor], Tensor]
) -> Path:
    """A copy of the tiny checkpoint, each tensor changed."""
    directory = subject.directory / f"{name}-{stored}"
    if not directory.is_dir():
        copy = subject.copy(subject.tiny(stored))
        for file in copy.glob("*.safetensors"):
            changed = {key: change(key, value) for key, value in load_file(file).items()}
            save_file(changed, file, metadata={"format": "pt"})
        copy.rename(directory)
    return directory


def _with_edges(name: str, value: Tensor) -> Tensor:
    """All codes of MXFP4 in each group of 32, and then all scales; the last rows are zeros."""
    if name.endswith(_SCALES):
        edges = torch.tensor(_EDGES, dtype=torch.uint8)
        return edges[torch.arange(value.numel()) % len(edges)].view(value.shape)
    if not name.endswith("_blocks"):
        return value
    group = torch.arange(value.numel() // 16)[:, None]
    place = torch.arange(16)
    codes = (place + group) % 16 + 16 * ((15 - place + 3 * group) % 16)
    found = codes.to(torch.uint8).view(value.shape).contiguous()
    found[-1, -1], found[-1, -2] = 0, 0x88  # zeros, and zeros with a sign
    return found


def _with_specials(name: str, value: Tensor) -> Tensor:
    """Numbers that change when they are computed with, at the start of a tensor of floats, in rows
    and columns; its last row is zeros.
    """
    if not value.is_floating_point():
        return value
    found = value.clone().contiguous()
    info = torch.finfo(value.dtype)
    smallest = info.smallest_normal
    numbers = [-0.0, 0.0, info.max, -info.max, smallest, -smallest, smallest / 2, -smallest / 4,
               smallest * info.eps, -smallest * info.eps, smallest * (1 - info.eps)]  # fmt: skip
    if found.dim() > 1:
        found[-1] = 0.0
        column = found.select(-1, 0)
        column.flatten()[: len(numbers)] = 0.0
        for i, number in zip(range(column.shape[0]), numbers, strict=False):
            column[i] = number
    flat = found.view(-1)
    flat[: len(numbers)] = torch.tensor(numbers, dtype=torch.float64)[: len(flat)]
    return found


def _check_bits(
    subject: Subject, directory: Path, dtype: str, what: str, wanted: Callable[[str], bool]
) -> None:
    """The parameters of a model, kept and streamed, must have the bits that transformers loads."""
    reference = Reference(directory, DTYPES[dtype]).model
    expected = reference.state_dict()
    layout = subject.adapter.layout(subject.config)
    for kept in (True, False):
        with subject.open(directory, dtype=dtype) as model:
            hold_weights(model, all_of_them=kept)
            for name, found in filter(lambda one: wanted(one[0]), bound_parameters(model, layout)):
                told = f"parameter {name} in {dtype}, {'kept' if kept else 'streamed'}, of {what}"
                _same_words(found, expected[name], told)


def _same_words(found: Tensor, expected: Tensor, what: str) -> None:
    """Raises AssertionError unless two tensors have the same bits: signs of zeros too."""
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape), (
        f"{what}: expected {expected.dtype} {list(expected.shape)}, "
        f"got {found.dtype} {list(found.shape)}"
    )
    words = [t.contiguous().view(_INTEGERS[t.element_size()]).flatten() for t in (found, expected)]
    if torch.equal(*words):
        return
    wrong = (words[0] != words[1]).nonzero().flatten()
    first = int(wrong[0])
    place = [int(i) for i in torch.unravel_index(torch.tensor(first), found.shape)]
    raise AssertionError(
        f"{what}: {len(wrong)} of {found.numel()} values differ, the first at {place}: expected "
        f"{float(expected.flatten()[first])!r}, got {float(found.flatten()[first])!r}"
    )
