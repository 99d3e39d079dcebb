"""The picture of `growth.py`: bytes read per new token, measured points over the plan's line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

PLAN, ENGINE, KERNEL = "#dd6b20", "#2b6cb0", "#2f855a"
ROWS = {"weights": "weights", "kv": "KV", "all": "everything"}


def draw(record: Mapping[str, Any], path: Path) -> None:
    """Draw the record into `path`, whose ending says in which format: a column for what grows, a
    row for what is read.
    """
    series = record["series"]
    figure = Figure(figsize=(3.3 * len(series), 8), dpi=100, layout="constrained")
    panels = figure.subplots(len(ROWS), len(series), sharex="col", squeeze=False)
    for column, one in enumerate(series.values()):
        for row, (kind, title) in enumerate(ROWS.items()):
            panel = panels[row][column]
            _panel(panel, one, kind)
            if column == 0:
                panel.set_ylabel(f"{title},\nMB per new token", fontsize=11)
        panels[-1][column].set_xlabel(one["title"], fontsize=11)
    handles, labels = panels[-1][-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(
        "Bytes read per new token as work grows: no layer kept in memory, KV on disk", fontsize=13
    )
    figure.savefig(path)


def _panel(panel: Axes, one: Mapping[str, Any], kind: str) -> None:
    runs = one["runs"]
    xs = [run[one["field"]] for run in runs]
    plan = [run["planned"][kind] / 1e6 for run in runs]
    panel.plot(xs, plan, "-", color=PLAN, linewidth=2, label="what the plan says")
    if kind == "all":
        kernel = [run["measured"]["kernel"] / 1e6 for run in runs]
        if any(kernel):
            label = "measured by the kernel"
            panel.plot(xs, kernel, "s", color=KERNEL, fillstyle="none", markersize=11, label=label)
    seen = [run["measured"][kind] / 1e6 for run in runs]
    panel.plot(xs, seen, "o", color=ENGINE, markersize=6, label="measured by the engine")
    if kind in one["slopes"]:
        line = one["slopes"][kind]
        text = "does not grow, as predicted"
        if line["arithmetic"] or line["measured"]:
            text = (
                f"per {line['against']}: {_size(line['measured'])}\n"
                f"predicted: {_size(line['arithmetic'])}"
            )
        panel.set_title(text, fontsize=9, color="#4a5568")
    panel.set_ylim(0, 1.18 * max(*plan, *seen))
    panel.set_xticks(xs)
    panel.spines[["top", "right"]].set_visible(False)


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 1e6:.4g} MB" if num_bytes >= 1e6 else f"{num_bytes:,.5g} bytes"
