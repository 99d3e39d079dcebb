"""`--profile`: the table of where the time of a run went."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ollm_core.memory.sizes import format_size
from ollm_core.profiling import READING

if TYPE_CHECKING:
    from ollm_core.contracts.progress import Stats
    from ollm_core.profiling import Profile, Total

PASSES = ("prefill", "decode")
"""Outermost spans of the thread that computes."""


def profile_table(profile: Profile, total_seconds: float, stats: Stats | None = None) -> str:
    """Seconds and parts of each stage of the passes, what is left of `total_seconds`, how busy the
    reading was, and by `stats` how much of the copying to a device was hidden, a line each.
    """
    spent = {name: profile.seconds(name) for name in PASSES}
    lines = ["time" + " " * 16 + "".join(f"{name:>18}" for name in PASSES)]
    stages = [name for outer, name in profile.totals if outer in PASSES and name not in PASSES]
    for stage in [*dict.fromkeys(stages), ""]:
        cells = ""
        for outer in PASSES:
            total = profile.totals.get((outer, stage or outer))
            cells += _cell(total.seconds if total else 0.0, spent[outer])
        lines.append(f"  {stage or 'the rest of a pass':<18}{cells}".rstrip())
    sums = "".join(f"{spent[name]:>10.2f} s      " for name in PASSES)
    lines.append(f"  {'together':<18}{sums}".rstrip())
    beside = total_seconds - sum(spent.values())
    lines.append(f"  {'between passes':<18}{beside:>10.2f} s, choosing tokens and text")
    reads = [total for (_, name), total in profile.totals.items() if name == READING]
    if reads:
        lines.append(f"  {'reading':<18}{_reading(reads, total_seconds)}")
    if stats is not None and stats.upload_seconds:
        lines.append(f"  {'copying to device':<18}{_copying(stats)}")
    return "\n".join(lines)


def _copying(stats: Stats) -> str:
    seconds = stats.upload_seconds
    hidden = max(1 - stats.upload_waited_seconds / seconds, 0.0)
    return (
        f"{seconds:>10.2f} s, {format_size(stats.uploaded_bytes)} at "
        f"{format_size(stats.uploaded_bytes / seconds)}/s, {hidden:.0%} of it beside compute"
    )


def _cell(seconds: float, whole: float) -> str:
    return f"{seconds:>10.2f} s {seconds / whole if whole else 0.0:>4.0%} "


def _reading(reads: list[Total], total_seconds: float) -> str:
    seconds = sum(total.seconds for total in reads)
    num_bytes = sum(total.numbers["num_bytes"] for total in reads)
    calls = sum(total.calls for total in reads)
    return (
        f"{seconds:>10.2f} s in {calls} calls, {format_size(num_bytes)} at "
        f"{format_size(num_bytes / seconds if seconds else 0.0)}/s, "
        f"{seconds / total_seconds if total_seconds else 0.0:.0%} of the time"
    )
