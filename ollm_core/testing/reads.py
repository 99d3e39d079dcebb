"""Reads of a model that are watched, and reads that fail."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from ollm_core.contracts.tensors import TensorInfo
from ollm_core.errors import ReadError
from ollm_core.generate.causal_lm import StreamedModel


@contextmanager
def counted_reads(model: StreamedModel) -> Iterator[Counter[str]]:
    """How often each tensor is asked of the model's reading engine in the `with` block."""
    seen: Counter[str] = Counter()

    def note(tensors: Sequence[TensorInfo]) -> None:
        seen.update(tensor.name for tensor in tensors)

    with _before_reads(model, note):
        yield seen


@contextmanager
def failing_reads(model: StreamedModel, after: int = 0) -> Iterator[None]:
    """In the `with` block every read of the model's reading engine is a ReadError, "the disk is
    gone", once `after` of them were made. What was read ahead is still there.
    """
    left = iter(range(after))

    def fail(_: Sequence[TensorInfo]) -> None:
        if next(left, None) is None:
            raise ReadError("the disk is gone")

    with _before_reads(model, fail):
        yield


@contextmanager
def _before_reads(
    model: StreamedModel, look: Callable[[Sequence[TensorInfo]], None]
) -> Iterator[None]:
    source = model.weights._source
    real = source.read

    def read(tensors: Sequence[TensorInfo], buffer: memoryview) -> Sequence[int]:
        look(tensors)
        return real(tensors, buffer)

    source.read = read  # type: ignore[method-assign]
    try:
        yield
    finally:
        source.read = real  # type: ignore[method-assign]
