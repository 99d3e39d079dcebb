"""Infers which stored tensors make a parameter, from how it is made. Torch is imported only to try
transforms.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import permutations

from ollm_core.contracts.tensors import ParameterSource
from ollm_core.errors import UnsupportedError

Shape = tuple[int, ...]


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
