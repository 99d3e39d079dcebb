"""benchmarks/memory/growth.py at toy size: slopes are those of arithmetic, and others are told."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace

import pytest

from benchmarks.memory.growth import SERIES, TOLERANCE, Work, faults, record_of, slopes
from benchmarks.memory.growth_plot import draw

BASE = Work(tokens=256, layers=1)


@pytest.fixture(scope="module")
def series():
    """Two points each of what grows by KV, of what shares weights, and of what grows by both."""
    return {
        "context": replace(SERIES["context"], values=(256, 512)),
        "batch": replace(SERIES["batch"], values=(1, 2)),
        "layers": replace(SERIES["layers"], values=(1, 2)),
    }


@pytest.fixture(scope="module")
def record(series, tmp_path_factory):
    """Really measured."""
    return record_of(series, BASE, tmp_path_factory.mktemp("growth"))


def test_slopes_are_as_predicted(record):
    """Of KV to the byte, of weights but for the rounding of reads to pages."""
    assert record["faults"] == []
    context, batch, layers = (one["slopes"] for one in record["series"].values())
    assert context["weights"]["arithmetic"] == context["weights"]["measured"] == 0
    assert context["kv"]["measured"] == 2 * 2 * 64 * 4  # two KV heads of 64, keys and values
    assert batch["kv"]["arithmetic"] == batch["kv"]["measured"] == 0
    assert batch["weights"]["measured"] == batch["weights"]["planned"]
    assert 0 < batch["weights"]["measured"] / BASE.layer_bytes - 1 < TOLERANCE
    assert layers["kv"]["measured"] == 256 * 2 * 2 * 64 * 4
    assert 0 < layers["weights"]["measured"] / BASE.layer_bytes - 1 < TOLERANCE
    json.dumps(record)


@pytest.mark.parametrize("kind", ["weights", "kv"])
def test_other_slopes_are_told(series, record, kind):
    """A hundredth more at one end is a fault, in a line that should be flat too."""
    for name, one in series.items():
        runs = deepcopy(record["series"][name]["runs"])
        runs[-1]["measured"][kind] *= 1.01
        told = faults(name, slopes(one, one.works(BASE), runs), runs)
        assert len(told) == 1
        assert told[0].startswith(f"{name}: {kind} grow by")


@pytest.mark.parametrize("change", ["less is planned", "more is planned", "the kernel has more"])
def test_other_counts_are_told(series, record, change):
    """Though the slopes are right."""
    runs = deepcopy(record["series"]["context"]["runs"])
    for run in runs:
        read = run["measured"]["all"]
        if change == "less is planned":
            run["planned"]["all"] = read - 1
        elif change == "more is planned":
            run["planned"]["all"] *= 1.1
        else:
            run["measured"]["kernel"] = 1.01 * read
    one = series["context"]
    assert len(faults("context", slopes(one, one.works(BASE), runs), runs)) == len(runs)


def test_the_picture(record, tmp_path):
    """Is written."""
    draw(record, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")
