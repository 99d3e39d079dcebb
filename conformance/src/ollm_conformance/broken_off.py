"""What breaks a pass off: Ctrl-C at one of its steps, and reads that fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from ollm_core import ReadError
from ollm_core.contracts.progress import Progress
from ollm_core.generate.causal_lm import StreamedModel


def interrupt_at(part: float, num_before: int = 0) -> Callable[[Progress], None]:
    """What presses Ctrl-C after a part of a pass, that many passes having gone before."""
    first: list[int] = []

    def interrupt(progress: Progress) -> None:
        first.append(progress.weight_passes)
        late = progress.weight_passes - first[0] >= num_before
        if late and progress.steps_done >= part * progress.steps_total:
            raise KeyboardInterrupt

    return interrupt


def fail_reads(model: StreamedModel, patch: pytest.MonkeyPatch, after: int) -> None:
    """Let every read fail once so many were made."""
    source = model.weights._source
    real, left = source.read, iter(range(after))

    def read(tensors: Any, buffer: Any) -> Any:
        if next(left, None) is None:
            raise ReadError("the disk is gone")
        return real(tensors, buffer)

    patch.setattr(source, "read", read)
