"""Long prompts through true layers of Llama 3.1 8B inside an enforced memory budget, KV on disk:
what the accounts held, what the process really held, and what the plan had said of that and of the
time.

usage: at_size.py [CASE ...] [--directory DIR] [--cap] [--json FILE]

CASE is a key of `CASES`; all of them by default. A checkpoint with random weights, and fewer layers
than the real one, is written to DIR for each and removed afterwards; where the vocabulary is not
the real one the record says so. Each case runs in a process of its own; --cap puts that into a
memory cgroup of the two budgets and 1 GB for interpreter, libraries and what the heap keeps
(capped.sh; root). Rates are measured first, as `ollm doctor` does, for the times of the plan.

The last line on stdout is the record as JSON; the report for people goes to stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

import ollm
from benchmarks.experts.full_shape import write_checkpoint
from benchmarks.tools.children import CAPPED, script
from benchmarks.tools.measure import (
    PeakAnonymousMemory,
    environment,
    finish,
    memory_cap,
    random_prompt,
    timed_generate,
)
from ollm_core.calibration.rates import measure_rates
from ollm_core.contracts.progress import Progress
from ollm_core.device.dtypes import DTYPES
from ollm_core.memory.host import peak_process_bytes
from ollm_core.plugins.registry import Registry

MODEL = "llama3-8B-chat"
PROCESS_BYTES = 1_000_000_000
NEW_TOKENS = 4


@dataclass(frozen=True, slots=True)
class Case:
    """One run."""

    num_layers: int
    num_tokens: int
    """Of the prompt."""
    vocab_size: int
    dtype: str
    device_memory: int
    host_memory: int
    """Of hidden states that the device has no room for, and of KV on its way to the disk."""


CASES: Mapping[str, Case] = MappingProxyType(
    {
        "bf16-4-layers-1k": Case(4, 1_000, 128_256, "bfloat16", 2_000_000_000, 250_000_000),
        "fp32-4-layers-10k": Case(4, 10_000, 16_384, "float32", 2_000_000_000, 250_000_000),
        "fp32-1-layer-10k": Case(1, 10_000, 4_096, "float32", 2_000_000_000, 2_000_000_000),
        "fp32-1-layer-25k": Case(1, 25_000, 4_096, "float32", 2_000_000_000, 2_000_000_000),
        "fp32-1-layer-50k": Case(1, 50_000, 4_096, "float32", 2_000_000_000, 2_000_000_000),
        "fp32-1-layer-100k": Case(1, 100_000, 4_096, "float32", 2_000_000_000, 2_000_000_000),
    }
)


def config_of(case: Case) -> dict[str, Any]:
    """The real config.json with fewer layers and the case's vocabulary and dtype."""
    config = dict(Registry.discover().find(MODEL)[1].config)
    del config["torch_dtype"]
    return {
        **config,
        "num_hidden_layers": case.num_layers,
        "vocab_size": case.vocab_size,
        "dtype": case.dtype,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def measure(case: Case, checkpoint: Path) -> dict[str, Any]:
    """The run itself, in a process that has done nothing else."""
    before = peak_process_bytes()
    prompt = random_prompt(case.num_tokens) % (case.vocab_size - 16) + 16
    with (
        PeakAnonymousMemory() as anonymous,
        ollm.load(
            checkpoint,
            device="cpu",
            device_memory=case.device_memory,
            host_memory=case.host_memory,
            kv="disk",
            on_progress=teller(),
        ) as model,
    ):
        timing = timed_generate(
            model,
            prompt,
            NEW_TOKENS,
            snapshot=lambda: None,
            between_tokens=lambda: None,
            eos_token_id=None,
        )
        stats = model.stats
    return {
        "prefill_seconds": round(timing.prefill_seconds, 2),
        "cpu_seconds": round(time.process_time(), 1),
        "decode_tokens_per_second": round(timing.decode_tokens_per_second, 4),
        "device_peak_bytes": stats.device_peak_bytes,
        "host_peak_bytes": stats.host_peak_bytes,
        "kv_disk_bytes": stats.kv_disk_bytes,
        "kv_bytes_read": stats.kv_bytes_read,
        "process_bytes_before": before,
        "process_peak_bytes": stats.process_peak_bytes,
        "peak_anonymous_bytes": anonymous.num_bytes,
        "cgroup_limit_bytes": memory_cap(),
        "attention": stats.attention,
        "chunk_size": stats.chunk_size,
        "resident_bytes": stats.resident_bytes,
        "reader": stats.reader,
        "tokens": timing.tokens,
    }


def teller() -> Callable[[Progress], None]:
    """Says about twice a minute how far a pass is."""
    told = time.monotonic()

    def tell(progress: Progress) -> None:
        nonlocal told
        if time.monotonic() - told > 30:
            told = time.monotonic()
            done = f"{progress.steps_done} of {progress.steps_total} steps"
            print(f"{progress.stage}: {done}", file=sys.stderr, flush=True)

    return tell


def planned(case: Case, checkpoint: Path) -> dict[str, Any]:
    """What `ollm plan` says of the same run, by rates that are measured now."""
    rates = measure_rates(checkpoint, torch.device("cpu"), DTYPES[case.dtype])
    plan = ollm.plan(
        checkpoint,
        device="cpu",
        device_memory=case.device_memory,
        host_memory=case.host_memory,
        context=case.num_tokens + NEW_TOKENS,
        max_new_tokens=NEW_TOKENS,
        kv="disk",
    )
    return {
        "fits": plan.fits,
        "device_peak_bytes": plan.device_peak_bytes,
        "host_peak_bytes": plan.host_peak_bytes,
        "disk_bytes": plan.disk_bytes,
        "device_bytes": plan.device_bytes,
        "prefill_seconds": round(plan.prefill_seconds, 2),
        "prefill_limited_by": plan.prefill_limited_by,
        "tokens_per_second": round(plan.tokens_per_second, 4),
        "limited_by": plan.limited_by,
        "rates": {
            "disk": rates.disk.per_second,
            "memory": rates.memory.per_second,
            "compute": rates.compute.per_second,
        },
    }


def run_case(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Write, plan, run apart, remove."""
    case = CASES[name]
    with tempfile.TemporaryDirectory(dir=args.directory, prefix="at-size-") as scratch:
        checkpoint = Path(scratch) / "model"
        write_checkpoint(checkpoint, config_of(case))
        plan = planned(case, checkpoint)
        command = [*script("at_size"), name, "--measure", str(checkpoint)]
        if args.cap:
            limit = case.device_memory + case.host_memory + PROCESS_BYTES
            command = [str(CAPPED), str(limit >> 20), *command]
        environ = {**os.environ, "TMPDIR": scratch}
        if not args.plain_malloc:
            environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 20)
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environ)
        if done.returncode:
            raise SystemExit(f"{name} ended with exit code {done.returncode}")
        found = json.loads(done.stdout.splitlines()[-1])
        shutil.rmtree(checkpoint)
    record = {**asdict(case), "planned": plan, "measured": found}
    record["load_average"] = round(os.getloadavg()[0], 2)
    report(name, record)
    return record


def report(name: str, record: Mapping[str, Any]) -> None:
    """One case, for people."""
    plan, found = record["planned"], record["measured"]
    print(
        f"{name}: device {found['device_peak_bytes'] / 1e9:.3f} GB "
        f"(planned {plan['device_peak_bytes'] / 1e9:.3f}, "
        f"allowed {record['device_memory'] / 1e9:.3f}), "
        f"process {found['process_peak_bytes'] / 1e9:.3f} GB, "
        f"KV on disk {found['kv_disk_bytes'] / 1e9:.3f} GB; "
        f"prefill {found['prefill_seconds']:.1f} s (planned {plan['prefill_seconds']:.1f}), "
        f"{found['decode_tokens_per_second']:.3g} tokens/s "
        f"(planned {plan['tokens_per_second']:.3g})",
        file=sys.stderr,
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Long prompts in an enforced memory budget.")
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}")
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--cap", action="store_true", help="in a memory cgroup; needs root")
    parser.add_argument(
        "--plain-malloc",
        action="store_true",
        help="without MALLOC_MMAP_THRESHOLD_, which gives freed memory back to the system",
    )
    parser.add_argument("--json", type=Path, help="write the record to this file")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := set(args.cases) - CASES.keys():
        parser.error(f"no such case: {', '.join(unknown)}")
    if args.measure:
        print(json.dumps(measure(CASES[args.cases[0]], args.measure)))
        return
    machine = environment(args.directory)
    runs = {name: run_case(name, args) for name in args.cases or CASES}
    record = {
        **machine,
        "model": MODEL,
        "threads": torch.get_num_threads(),
        "new_tokens": NEW_TOKENS,
        "plain_malloc": args.plain_malloc,
        "runs": runs,
    }
    finish(record, args.json)


if __name__ == "__main__":
    main()
