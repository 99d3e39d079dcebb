"""What breaks a pass off: Ctrl-C at one of its steps."""

from __future__ import annotations

from collections.abc import Callable

from ollm_core.testing import Progress


def interrupt_at(part: float, num_before: int = 0) -> Callable[[Progress], None]:
    """What presses Ctrl-C after a part of a pass, that many passes having gone before."""
    first: list[int] = []

    def interrupt(progress: Progress) -> None:
        first.append(progress.weight_passes)
        late = progress.weight_passes - first[0] >= num_before
        if late and progress.steps_done >= part * progress.steps_total:
            raise KeyboardInterrupt

    return interrupt
