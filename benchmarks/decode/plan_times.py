"""What `ollm plan` says a run will take, beside what it takes: prompt and decode, on the CPU.

usage: plan_times.py [CHECKPOINT] [--json FILE]

CHECKPOINT is models/smollm2-135M by default. Rates are measured before each run, as `ollm doctor`
does. Seconds of the processor stand beside those of the clock, for a machine that others use too.
Weights are streamed or kept, KV is in memory or on disk, in bfloat16 and float32. Runs are warm:
the page cache is left alone, and reading is O_DIRECT.

The last line on stdout is the record as JSON; the report for people goes to stderr.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import ollm
from benchmarks import MODELS
from benchmarks.tools.measure import environment, finish, random_prompt, timed_generate
from ollm_core.calibration.rates import Rates, measure_rates
from ollm_core.model.spec import DTYPES

MODEL = MODELS / "smollm2-135M"


@dataclass(frozen=True, slots=True)
class Run:
    """One way to run it."""

    dtype: str
    device_memory: str
    kv: str
    num_tokens: int
    """Of the prompt."""
    num_new: int = 16


RUNS = (
    Run("bfloat16", "1GB", "device", 200),
    Run("float32", "2GB", "device", 500),
    Run("float32", "600MB", "disk", 500),
    Run("float32", "2GB", "device", 3000),
)


def compare(checkpoint: Path, run: Run) -> dict[str, Any]:
    """Plan and measure one run."""
    rates = measure_rates(checkpoint, torch.device("cpu"), DTYPES[run.dtype])
    given = {"dtype": run.dtype, "device_memory": run.device_memory, "kv": run.kv}
    plan = ollm.plan(
        checkpoint,
        device="cpu",
        host_memory="500MB",
        context=run.num_tokens + run.num_new,
        max_new_tokens=run.num_new,
        rates=rates,
        **given,
    )
    with ollm.load(
        checkpoint, device="cpu", host_memory="500MB", reader="direct", **given
    ) as model:
        cpu = time.process_time()
        timing = timed_generate(
            model,
            random_prompt(run.num_tokens),
            run.num_new,
            snapshot=time.process_time,
            between_tokens=lambda: None,
            eos_token_id=None,
        )
        peak = model.stats.device_peak_bytes
    return {
        **asdict(run),
        "planned_prefill_seconds": round(plan.prefill_seconds, 2),
        "prefill_seconds": round(timing.prefill_seconds, 2),
        "prefill_cpu_seconds": round(timing.snapshots[0] - cpu, 2),
        "prefill_ratio": round(timing.prefill_seconds / plan.prefill_seconds, 3),
        "planned_tokens_per_second": round(plan.tokens_per_second, 3),
        "tokens_per_second": round(timing.decode_tokens_per_second, 3),
        "cpu_seconds_per_token": round(
            (timing.snapshots[-1] - timing.snapshots[0]) / (run.num_new - 1), 4
        ),
        "decode_ratio": round(plan.tokens_per_second / timing.decode_tokens_per_second, 3),
        "planned_device_peak_bytes": plan.device_peak_bytes,
        "device_peak_bytes": peak,
        "limited_by": [plan.prefill_limited_by, plan.limited_by],
        "attention": plan.placement["attention"],
        "chunk_size": plan.placement["chunk_size"],
        "rates": _per_second(rates),
        "load_average": round(os.getloadavg()[0], 2),
    }


def _per_second(rates: Rates) -> dict[str, float]:
    found = {"disk": rates.disk, "memory": rates.memory, "compute": rates.compute}
    return {name: round(rate.per_second) for name, rate in found.items()}


def compared(checkpoint: Path) -> Iterator[dict[str, Any]]:
    """Every run, told as it ends."""
    for run in RUNS:
        found = compare(checkpoint, run)
        wanted = found["planned_prefill_seconds"], 1 / found["planned_tokens_per_second"]
        print(
            f"{run.dtype:8} {run.device_memory:>6} {run.kv:6} {run.num_tokens:5} tokens: "
            f"prompt {found['prefill_seconds']:.2f} s, {found['prefill_cpu_seconds']:.2f} of "
            f"the processor, planned {wanted[0]:.2f}; "
            f"a token {1 / found['tokens_per_second']:.3f} s, "
            f"{found['cpu_seconds_per_token']:.3f}, planned {wanted[1]:.3f}",
            file=sys.stderr,
            flush=True,
        )
        yield found


def main() -> None:
    parser = argparse.ArgumentParser(description="Planned and measured times.")
    parser.add_argument("checkpoint", nargs="?", type=Path, default=MODEL)
    parser.add_argument("--json", type=Path, help="write the record to this file")
    args = parser.parse_args()
    record = {
        **environment(args.checkpoint),
        "model": args.checkpoint.name,
        "threads": torch.get_num_threads(),
        "runs": list(compared(args.checkpoint)),
    }
    finish(record, args.json)


if __name__ == "__main__":
    main()
