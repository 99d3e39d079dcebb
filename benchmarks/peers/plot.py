"""The picture of a comparison: how fast each program decodes beside what the disk would allow, and
the memory that it takes beside what all of them are allowed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

OURS, PEER, FAILED = "#2b6cb0", "#a0aec0", "#9b2c2c"
LIMIT, ROUND = "#c05621", "#1a202c"


def draw(record: Mapping[str, Any], path: Path) -> None:
    """Draw the record of `compare.py` into `path`, whose ending says in which format."""
    runs, failed = record["runs"], record["failed"]
    ran = sorted(runs, key=lambda name: -_average(runs[name], "decode_tok_s"))
    names = ran + [name for name in failed if name not in runs]
    figure = Figure(figsize=(11, 2.6 + 0.52 * len(names)), dpi=130, layout="constrained")
    speed, memory = figure.subplots(1, 2, sharey=True, width_ratios=(2.1, 1))
    _speed(speed, record, ran)
    _memory(memory, record, ran)
    for row, name in enumerate(names[len(ran) :], start=len(ran)):
        speed.text(0, row, f"  failed: {failed[name][:70]}", va="center", fontsize=9, color=FAILED)
    speed.set_yticks(range(len(names)), [record["titles"][name] for name in names], fontsize=11)
    speed.set_ylim(len(names) - 0.4, -1.35 if "cap_full_tok_s" in record["bounds"] else -0.9)
    for panel in (speed, memory):
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(axis="y", length=0)
    figure.suptitle(
        f"A {record['weight_bytes'] / 1e9:.2f} GB model in {_cap(record)} of memory, bf16, "
        f"{record['machine']['cores']} cores, no GPU",
        fontsize=13,
    )
    load = max(run["load_average"] for found in runs.values() for run in found)
    cores = record["machine"]["cores"]
    figure.supxlabel(
        f"{record['date']}, {record['machine']['cpu']}, cold page cache, "
        f"{_rounds(runs)}; load average up to {load:.1f} on {cores} cores",
        fontsize=8.5,
        color="#4a5568",
    )
    figure.savefig(path)


def _speed(panel: Axes, record: Mapping[str, Any], ran: Sequence[str]) -> None:
    """A bar for the mean of each program, a dot for each round, a line for each limit."""
    runs, limits, ours = record["runs"], record["bounds"], record["ours"]
    most = 0.0
    for row, name in enumerate(ran):
        rates = [run["decode_tok_s"] for run in runs[name]]
        panel.barh(row, mean(rates), height=0.62, color=OURS if name == ours else PEER)
        panel.plot(rates, [row] * len(rates), "o", color=ROUND, markersize=3.5)
        ratio = ""
        if name != ours and ours in runs:
            ratio = f", ours is {_average(runs[ours], 'decode_tok_s') / mean(rates):.1f}x as fast"
        weight = "bold" if name == ours else "normal"
        _beside(panel, max(rates), row, f"{mean(rates):.2f}{ratio}", fontweight=weight)
        most = max(most, *rates)
    told = [("nothing_kept_tok_s", "the disk alone, nothing\nkept in memory")]
    if "cap_full_tok_s" in limits:
        told.append(("cap_full_tok_s", "the disk alone, memory\nfull of weights"))
    for key, text in told:
        most = max(most, limits[key])
        _limit(panel, limits[key], f"{text}: {limits[key]:.2f}")
    panel.set_xlim(0, 1.06 * most)
    panel.set_xlabel("decode, tokens per second (longer is better; dots are single rounds)")


def _memory(panel: Axes, record: Mapping[str, Any], ran: Sequence[str]) -> None:
    """A bar for the peak of each program, a line for what it may use."""
    runs = record["runs"]
    for row, name in enumerate(ran):
        peak = max(run["peak_anon_mb"] for run in runs[name])
        panel.barh(row, peak, height=0.62, color=OURS if name == record["ours"] else PEER)
        _beside(panel, peak, row, f"{peak:,}")
    most = max(run["peak_anon_mb"] for found in runs.values() for run in found)
    if cap := record["cap_mib"]:
        most = max(most, cap)
        _limit(panel, cap, f"allowed: {cap:,}")
    panel.set_xlim(0, 1.22 * most)
    panel.set_xlabel("peak anonymous memory, MiB\n(the page cache takes the rest)")


def _beside(panel: Axes, x: float, row: int, text: str, **font: Any) -> None:
    """`text` to the right of a bar that ends at `x`, legible where a line crosses it."""
    panel.annotate(
        text,
        (x, row),
        xytext=(9, 0),
        textcoords="offset points",
        va="center",
        fontsize=10,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
        **font,
    )


def _limit(panel: Axes, x: float, text: str) -> None:
    """A line from top to bottom, `text` to its left above the bars."""
    panel.axvline(x, color=LIMIT, linestyle="--", linewidth=1.3, zorder=0)
    panel.annotate(
        text,
        (x, -0.5),
        xytext=(-5, 0),
        textcoords="offset points",
        ha="right",
        color=LIMIT,
        fontsize=9,
    )


def _average(runs: Sequence[Mapping[str, Any]], key: str) -> float:
    return mean(run[key] for run in runs)


def _rounds(runs: Mapping[str, Sequence[Any]]) -> str:
    number = max(len(found) for found in runs.values())
    return f"{number} rounds in turns" if number > 1 else "one round"


def _cap(record: Mapping[str, Any]) -> str:
    return f"{record['cap_mib']:,} MiB" if record["cap_mib"] else "unlimited"
