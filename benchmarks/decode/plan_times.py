"""What `ollm plan` says a run will take, beside what it takes: prompt and decode, on the CPU.

usage: plan_times.py [CHECKPOINT] [--prompts 128,2000,7500] [--memory 1GB,150MB] [--dtype bfloat16]
                     [--precision fast] [--avx2] [--json FILE]

CHECKPOINT is models/smollm2-135M by default; each prompt runs in each memory, with KV on the device
where all weights are kept, else on disk. Rates are measured first, as `ollm doctor` does. Seconds
of the processor stand beside those of the clock, for a machine that others use too. Runs are warm:
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
from benchmarks.tools.instructions import AVX2
from benchmarks.tools.measure import environment, finish, random_prompt, timed_generate
from ollm_core.calibration.rates import Rates, as_fields, find_rates, measure_rates
from ollm_core.device.dtypes import DTYPES

MODEL = MODELS / "smollm2-135M"


@dataclass(frozen=True, slots=True)
class Run:
    """One way to run it."""

    dtype: str
    precision: str
    device_memory: str
    kv: str
    num_tokens: int
    """Of the prompt."""
    num_new: int = 16


def compare(checkpoint: Path, run: Run, rates: Rates) -> dict[str, Any]:
    """Plan and measure one run."""
    given = {
        "dtype": run.dtype,
        "device_memory": run.device_memory,
        "kv": run.kv,
        "precision": run.precision,
    }
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
        "load_average": round(os.getloadavg()[0], 2),
    }


def compared(args: argparse.Namespace, rates: Rates) -> Iterator[dict[str, Any]]:
    """Every run, told as it ends."""
    for memory, kv in zip(args.memory.split(","), ("device", "disk"), strict=False):
        for num_tokens in map(int, args.prompts.split(",")):
            run = Run(args.dtype, args.precision, memory, kv, num_tokens)
            found = compare(args.checkpoint, run, rates)
            wanted = found["planned_prefill_seconds"], 1 / found["planned_tokens_per_second"]
            print(
                f"{memory:>6} {kv:6} {num_tokens:5} tokens: prompt "
                f"{found['prefill_seconds']:.2f} s, planned {wanted[0]:.2f} "
                f"({found['prefill_ratio']:.2f} times); a token "
                f"{1 / found['tokens_per_second']:.4f} s, planned {wanted[1]:.4f} "
                f"({found['decode_ratio']:.2f} times); by {' and '.join(found['limited_by'])}",
                file=sys.stderr,
                flush=True,
            )
            yield found


def main() -> None:
    parser = argparse.ArgumentParser(description="Planned and measured times.")
    parser.add_argument("checkpoint", nargs="?", type=Path, default=MODEL)
    parser.add_argument("--prompts", default="128,2000,7500", help="tokens of each")
    parser.add_argument("--memory", default="1GB,150MB", help="all weights kept, and not")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--precision", default="fast")
    parser.add_argument("--avx2", action="store_true", help="nothing beyond AVX2")
    parser.add_argument("--json", type=Path, help="write the record to this file")
    args = parser.parse_args()
    if args.avx2 and os.environ.get("ATEN_CPU_CAPABILITY") != AVX2["ATEN_CPU_CAPABILITY"]:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **AVX2})
    measure_rates(args.checkpoint, torch.device("cpu"), DTYPES[args.dtype])
    rates = find_rates(args.checkpoint, torch.device("cpu"), DTYPES[args.dtype], args.precision)
    record = {
        **environment(args.checkpoint),
        "model": args.checkpoint.name,
        "avx2": args.avx2,
        "threads": torch.get_num_threads(),
        "rates": as_fields(rates),
        "runs": list(compared(args, rates)),
    }
    finish(record, args.json)


if __name__ == "__main__":
    main()
