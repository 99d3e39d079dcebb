"""`--plot`: draws both memories over a run in the terminal, one bar for each pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ollm_core.memory.kinds import label_of
from ollm_core.memory.sizes import format_size

if TYPE_CHECKING:
    from ollm_core.planning.dry_run import Moment

_MARKS = "#=+-:*o%.@"
_MAX_ROWS = 16


def draw(moments: Sequence[Moment], limit: int, width: int = 80) -> str:
    """Rows of at most `width` characters: the device's memory at some moments, from left to right
    what it is made of, with `limit` bytes at the end of the bar; then what the marks mean.
    """
    step = -(-len(moments) // _MAX_ROWS)
    shown = [*moments[:2], *moments[2:-1:step], *moments[2:][-1:]]
    kinds: dict[str, int] = {}
    for moment in shown:
        for kind, num_bytes in moment.device.items():
            kinds[kind] = max(kinds.get(kind, 0), num_bytes)
    order = sorted(kinds, key=lambda kind: -kinds[kind])
    marks = {kind: _MARKS[min(i, len(_MARKS) - 1)] for i, kind in enumerate(order)}
    label = max(len(moment.name) for moment in shown)
    room = max(width - label - 14, 10)
    rows = [
        f"{moment.name:<{label}} |{_bar(moment, marks, limit, room):<{room}}| "
        f"{format_size(moment.device_bytes)}"
        for moment in shown
    ]
    scale = f"{'':<{label}} 0{format_size(limit):>{room}}"
    legend = [f"{marks[kind]} {label_of(kind)}" for kind in order]
    return "\n".join(["device memory over the run", *rows, scale, *legend])


def _bar(moment: Moment, marks: Mapping[str, str], limit: int, room: int) -> str:
    """Ends where the sum does, rounded up to whole characters."""
    bar, total = "", 0
    for kind in marks:
        total += moment.device.get(kind, 0)
        bar += marks[kind] * (-(-total * room // limit) - len(bar))
    return bar
