"""`--plot FILE`: draws both memories over a run into a file, stacked by kind. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ollm_core.errors import InputError
from ollm_core.memory.kinds import MemoryKind, colour_of, label_of
from ollm_core.memory.sizes import format_size

if TYPE_CHECKING:
    from ollm_core.planning.plan import Plan

FORMATS = (".png", ".svg", ".pdf")

_LIMIT, _PEAK = "#b30000", "#444444"
_OPENED, _PROMPT, _STEPS = 0.12, 0.38, 0.5  # widths of the phases
_SMALL = 0.004  # of the peak: kinds below are drawn, and not in the legend


def save(plan: Plan, path: Path) -> None:
    """Draw the device's and the host's memory over the run of `plan` into `path`, whose ending
    says in which of `FORMATS`.

    Raises InputError for another ending, without matplotlib, or if the file cannot be written.
    """
    check_path(path)
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(
            "a picture needs matplotlib, which is not installed",
            hint="pip install 'ollm-core[plot]', or draw in the terminal with --plot alone",
        ) from error
    figure = Figure(figsize=(10, 6.4), dpi=140, layout="constrained")
    panels = figure.subplots(2, 1, sharex=True)
    edges = _edges(plan)
    for panel, name, limit, held in (
        (panels[0], "device", plan.device_memory, [moment.device for moment in plan.moments]),
        (panels[1], "host", plan.host_memory, [moment.host for moment in plan.moments]),
    ):
        _panel(panel, name, limit, held, edges)
    _phases(panels[0], panels[1], plan)
    figure.suptitle(
        f"{plan.model} in {plan.dtype} on {plan.device}: "
        f"{plan.batch} x {plan.context:,} tokens, KV on {plan.placement['kv']}",
        fontsize=12,
    )
    try:
        figure.savefig(path)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from error


def check_path(path: Path) -> None:
    """Raises InputError for a file name that is none of a picture."""
    if path.suffix.lower() not in FORMATS:
        raise InputError(
            f"{str(path)!r} is no name for a picture",
            hint=f"one that ends in {' or '.join(FORMATS)}; --plot alone draws in the terminal",
        )


def _edges(plan: Plan) -> list[float]:
    """Where each moment begins, and where the last one ends, from 0 to 1."""
    first, end = plan.context - plan.max_new_tokens, plan.context
    steps = [
        _OPENED + _PROMPT + _STEPS * (moment.num_tokens - first) / (end - first)
        for moment in plan.moments[2:]
    ]
    return [0.0, _OPENED, *steps, 1.0]


def _panel(
    panel: Any,
    name: str,
    limit: int,
    held: Sequence[Mapping[str, int]],
    edges: Sequence[float],
) -> None:
    """One memory: what is held from each edge to the next, what is allowed, what is what."""
    most: dict[str, int] = {}
    for kinds in held:
        for kind, num_bytes in kinds.items():
            most[kind] = max(most.get(kind, 0), num_bytes)
    order = [*(kind for kind in MemoryKind if kind in most), *sorted(set(most) - set(MemoryKind))]
    peak = max((sum(kinds.values()) for kinds in held), default=0)
    unit, size = ("GB", 1e9) if peak >= 1e9 else ("MB", 1e6)
    below = [0.0] * len(edges)
    for kind in order:
        steps = [kinds.get(kind, 0) / size for kinds in held]
        above = [low + step for low, step in zip(below, [*steps, steps[-1]], strict=True)]
        panel.fill_between(
            edges,
            below,
            above,
            step="post",
            color=colour_of(kind),
            linewidth=0,
            label=f"{label_of(kind)}, {format_size(most[kind])}"
            if most[kind] >= _SMALL * peak
            else "_",
        )
        below = above
    top = max(peak, 1) / size * 1.22
    told = f"peak {format_size(peak)} / limit {format_size(limit)}"
    if limit <= 2 * peak:
        top = max(top, limit / size * 1.12)
        _line(panel, limit / size, told, _LIMIT, "--")
    else:
        _line(panel, peak / size, told, _PEAK, ":")
    panel.set_ylim(0, top)
    panel.set_xlim(0, 1)
    panel.set_ylabel(f"{name} memory, {unit}")
    panel.spines[["top", "right"]].set_visible(False)
    handles, labels = panel.get_legend_handles_labels()
    panel.legend(
        handles[::-1],
        labels[::-1],
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
        frameon=False,
        fontsize=9,
    )


def _line(panel: Any, height: float, text: str, colour: str, style: str) -> None:
    panel.axhline(height, color=colour, linewidth=1.2, linestyle=style)
    panel.text(0.995, height, text, color=colour, fontsize=9, va="bottom", ha="right")


def _phases(upper: Any, lower: Any, plan: Plan) -> None:
    """What is going on, above the upper panel and below the lower one."""
    starts = (0.0, _OPENED, _OPENED + _PROMPT)
    prompt = plan.context - plan.max_new_tokens
    seconds = plan.batch * plan.max_new_tokens / plan.tokens_per_second
    told = (
        "opened",
        f"prompt of {prompt:,} tokens\n{_time(plan.prefill_seconds)}",
        f"{plan.max_new_tokens:,} new tokens\n{_time(seconds)}, "
        f"{plan.tokens_per_second:.3g} tokens/s",
    )
    for start, width, text in zip(starts, (_OPENED, _PROMPT, _STEPS), told, strict=True):
        for panel in (upper, lower):
            panel.axvline(start, color="#888888", linewidth=0.8)
        upper.annotate(
            text,
            (start + width / 2, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 4),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=9,
        )
    fractions = (0.0, 0.5, 1.0)
    begin = starts[2]
    lower.set_xticks([begin + _STEPS * part for part in fractions])
    lower.set_xticklabels([f"{prompt + int(plan.max_new_tokens * part):,}" for part in fractions])
    lower.set_xlabel("tokens of each sequence, while new ones are made", loc="right", fontsize=9)


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"
