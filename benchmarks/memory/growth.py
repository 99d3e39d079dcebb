"""Cost as work grows: bytes of weights and of KV read per new token, against context, batch, layers
and hidden size, beside what the plan says of the same run and what arithmetic says of the slope.

usage: growth.py [--directory DIR] [--json FILE] [--plot FILE.png]

Random Llamas are written to DIR and removed afterwards. No layer is kept in memory and KV is on
disk, so that a decode step reads all of both. Three counts stand side by side: the engine's, of
weights and of KV; the kernel's of this process (/proc/self/io), of everything; and the plan's.
Bytes do not depend on how busy the machine is.

The exit code is 1 if a measured slope is not the predicted one within `TOLERANCE`, if the kernel
counted other bytes than the engine by more than that, or if the plan says less than was read, or
more by more than the KV of the new tokens: those are in an unfinished block, which is in memory.

The last line on stdout is the record as JSON; the report for people goes to stderr.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from statistics import linear_regression, mean
from types import MappingProxyType
from typing import Any

import torch

import ollm
from benchmarks.memory.growth_plot import draw
from benchmarks.tools.cold import Counts
from benchmarks.tools.make_checkpoint import Shape, write_checkpoint
from benchmarks.tools.measure import environment, timed_generate
from ollm_core.device.dtypes import DTYPES
from ollm_core.options import PlanOptions
from ollm_core.planning.planner import Planner

TOLERANCE = 0.005
"""Of a slope, or where that is to be 0 of the mean."""
NEW_TOKENS = 6
"""The first comes with the prompt; the second is not measured, so that all code has run once."""
DTYPE = "float32"
"""Weights are bfloat16 on disk; KV is of this."""
MEMORY = {"device_memory": "2GB", "host_memory": "1GB"}


@dataclass(frozen=True, slots=True)
class Work:
    """One run."""

    tokens: int = 1024
    """Of each prompt: whole blocks of KV."""
    batch: int = 1
    layers: int = 4
    hidden: int = 256

    @property
    def shape(self) -> Shape:
        """Heads of 64 dimensions, two for each KV head."""
        heads = self.hidden // 64
        return Shape(self.hidden, 3 * self.hidden, self.layers, heads, max(heads // 2, 1), 4096)

    @property
    def kv_size(self) -> int:
        """Numbers in the keys of a token in a layer, and as many in its values."""
        return self.hidden // self.shape.heads * self.shape.kv_heads

    @property
    def layer_bytes(self) -> int:
        """A layer in the checkpoint."""
        hidden, shape = self.hidden, self.shape
        attention = 2 * hidden * hidden + 2 * hidden * self.kv_size
        return 2 * (attention + 3 * hidden * shape.intermediate + 2 * hidden)

    @property
    def weight_bytes(self) -> float:
        """Read per new token, if no layer is kept."""
        return self.layers * self.layer_bytes / self.batch

    @property
    def kv_bytes(self) -> int:
        """Read per new token, of its own sequence."""
        return self.layers * self.tokens * 2 * self.kv_size * DTYPES[DTYPE].itemsize


@dataclass(frozen=True, slots=True)
class Series:
    """What grows, and what weights and KV are a straight line against."""

    field: str
    title: str
    values: Sequence[int]
    weights_against: str
    weights_x: Callable[[Work], float]
    kv_against: str
    kv_x: Callable[[Work], float]

    def works(self, base: Work) -> list[Work]:
        """The runs."""
        return [replace(base, **{self.field: value}) for value in self.values]


SERIES: Mapping[str, Series] = MappingProxyType(
    {
        "context": Series(
            "tokens",
            "context, tokens",
            (1024, 2048, 4096),
            "token",
            lambda work: work.tokens,
            "token",
            lambda work: work.tokens,
        ),
        "batch": Series(
            "batch",
            "batch, sequences",
            (1, 2, 4),
            "1 / batch",
            lambda work: 1 / work.batch,
            "sequence",
            lambda work: work.batch,
        ),
        "layers": Series(
            "layers",
            "layers",
            (4, 8, 16),
            "layer",
            lambda work: work.layers,
            "layer",
            lambda work: work.layers,
        ),
        "hidden": Series(
            "hidden",
            "hidden size",
            (256, 512, 1024),
            "byte of the layers",
            lambda work: work.layers * work.layer_bytes,
            "hidden dimension",
            lambda work: work.hidden,
        ),
    }
)


def planned(checkpoint: Path, work: Work) -> dict[str, float]:
    """What the plan says is read per new token."""
    options = PlanOptions(
        **MEMORY,
        device="cpu",
        dtype=DTYPE,
        context=work.tokens + NEW_TOKENS,
        max_new_tokens=NEW_TOKENS,
        batch=work.batch,
        kv="disk",
        device_layers=0,
    )
    plan = Planner(checkpoint, options).plan(compare=False)
    kv = plan.kv_bytes / work.batch
    read = plan.bytes_read_per_token
    return {"weights": read - kv, "kv": kv, "all": read}


def measured(checkpoint: Path, work: Work) -> dict[str, Any]:
    """What the engine and the kernel count per new token, over all steps but the first."""
    generator, tokens = torch.Generator().manual_seed(0), count()
    prompt = torch.randint(16, work.shape.vocab, (work.batch, work.tokens), generator=generator)
    with ollm.load(
        checkpoint, device="cpu", dtype=DTYPE, **MEMORY, kv="disk", device_layers=0
    ) as model:

        def counted() -> tuple[int, int, int]:
            if next(tokens) in (1, NEW_TOKENS - 1):  # the two that are looked at
                settle(lambda: model.stats.weight_bytes_read)
            stats = model.stats
            return stats.weight_bytes_read, stats.kv_bytes_read, Counts.now().read_bytes

        timing = timed_generate(
            model,
            prompt,
            NEW_TOKENS,
            snapshot=counted,
            between_tokens=lambda: None,
            eos_token_id=None,
        )
        direct = model.stats.reader == "direct"
    steps = timing.snapshots[1:]
    new_tokens = work.batch * (len(steps) - 1)
    weights, kv, everything = (
        (last - first) / new_tokens for first, last in zip(steps[0], steps[-1], strict=True)
    )
    return {"weights": weights, "kv": kv, "all": weights + kv, "kernel": everything * direct}


def settle(counted: Callable[[], int], seconds: float = 0.02, times: int = 5) -> None:
    """Return when `counted` was the same so many times: the ring has read as far ahead as it can,
    so that steps can be told apart.
    """
    last, same = counted(), 0
    while same < times:
        time.sleep(seconds)
        now = counted()
        last, same = now, same + 1 if now == last else 0


def grow(series: Series, base: Work, directory: Path) -> list[dict[str, Any]]:
    """Every run of one series, with arithmetic, plan and measurement."""
    found = []
    for work in series.works(base):
        with tempfile.TemporaryDirectory(dir=directory, prefix="growth-") as scratch:
            checkpoint = Path(scratch)
            write_checkpoint(checkpoint, work.shape)
            runs = {"planned": planned(checkpoint, work), "measured": measured(checkpoint, work)}
        arithmetic = {"weights": work.weight_bytes, "kv": work.kv_bytes}
        found.append({**asdict(work), "arithmetic": arithmetic, **runs})
    return found


def slopes(series: Series, works: Sequence[Work], runs: Sequence[Any]) -> dict[str, Any]:
    """Of weights and of KV: what the line is against, its slope by arithmetic, plan and
    measurement, and by how much the last differs from the first.
    """
    told = {}
    for kind, against, x_of in (
        ("weights", series.weights_against, series.weights_x),
        ("kv", series.kv_against, series.kv_x),
    ):
        xs = [x_of(work) for work in works]
        lines = {
            name: [float(run[name][kind]) for run in runs]
            for name in ("arithmetic", "planned", "measured")
        }
        slope = {name: linear_regression(xs, ys).slope for name, ys in lines.items()}
        apart = abs(slope["measured"] - slope["arithmetic"])
        if any(y != lines["arithmetic"][0] for y in lines["arithmetic"]):
            apart /= abs(slope["arithmetic"])
        else:  # to be flat: what it changes by over the whole range
            slope["arithmetic"] = 0.0
            apart = abs(slope["measured"]) * (max(xs) - min(xs)) / mean(lines["arithmetic"])
        told[kind] = {"against": against, **slope, "apart": round(apart, 6)}
    return told


def faults(name: str, told: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is not as it should be in one series, in words."""
    found = [
        f"{name}: {kind} grow by {line['measured']:.6g} bytes, not {line['arithmetic']:.6g}"
        for kind, line in told.items()
        if line["apart"] > TOLERANCE
    ]
    for run in runs:
        plan, seen = run["planned"], run["measured"]
        where = f"{name}, {run['tokens']} tokens, batch {run['batch']}, {run['layers']} layers"
        in_memory = run["arithmetic"]["kv"] / run["tokens"] * NEW_TOKENS
        if not 0 <= plan["all"] - seen["all"] <= in_memory:
            found.append(f"{where}: {plan['all']:.0f} bytes planned, {seen['all']:.0f} read")
        if seen["kernel"] and abs(seen["kernel"] / seen["all"] - 1) > TOLERANCE:
            found.append(
                f"{where}: {seen['kernel']:.0f} bytes by the kernel, not {seen['all']:.0f}"
            )
    return found


def report(name: str, told: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> None:
    """One series, for people."""
    say(f"{name}: bytes per new token")
    for run in runs:
        plan, seen = run["planned"], run["measured"]
        say(
            f"  {run['tokens']:5} tokens x {run['batch']}, {run['layers']:2} layers of "
            f"{run['hidden']:4}: weights {seen['weights']:13,.0f} KV {seen['kv']:12,.0f} "
            f"kernel {seen['kernel']:13,.0f} plan {plan['all']:13,.0f}"
        )
    for kind, line in told.items():
        say(
            f"  {kind} grow per {line['against']}: {line['arithmetic']:,.6g} predicted, "
            f"{line['planned']:,.6g} planned, {line['measured']:,.6g} measured"
        )


def say(text: str) -> None:
    """To people, at once."""
    print(text, file=sys.stderr, flush=True)


def record_of(series: Mapping[str, Series], base: Work, directory: Path) -> dict[str, Any]:
    """Measure `series` and compare; `faults` in it is empty if all is as predicted."""
    found: dict[str, Any] = {}
    wrong: list[str] = []
    for name, one in series.items():
        runs = grow(one, base, directory)
        told = slopes(one, one.works(base), runs)
        report(name, told, runs)
        wrong += faults(name, told, runs)
        found[name] = {"field": one.field, "title": one.title, "slopes": told, "runs": runs}
    return {
        **environment(directory),
        "dtype": DTYPE,
        "tolerance": TOLERANCE,
        "measured_steps": NEW_TOKENS - 2,
        "faults": wrong,
        "series": found,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Bytes read per new token as work grows.")
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--json", type=Path, help="write the record to this file")
    parser.add_argument("--plot", type=Path, help="draw it into this file")
    args = parser.parse_args()
    record = record_of(SERIES, Work(), args.directory)
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    if args.plot:
        draw(record, args.plot)
    print(json.dumps(record))
    for fault in record["faults"]:
        say(f"error: {fault}")
    return 1 if record["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
