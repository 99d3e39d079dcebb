"""Prefill and decode of a streamed model beside the disk's own limit and, if wanted, a peer.

usage: decode.py [CHECKPOINT] [--prompt 128] [--new 6] [--device-memory 1100MB] [--json FILE]
       decode.py CHECKPOINT --cap 1500 --peer "COMMAND" [--rounds 2] [--json FILE]

Without CHECKPOINT, one of 2.57 GB is written to models/random-llama first, if it is not there. The
disk is probed on the model's own files before and after the run. The prompt is the same random
tokens everywhere, and the checkpoint is dropped from the page cache before every weight pass,
outside the measured time.

--cap MB runs everything in a memory cgroup of its own (capped.sh; root), so that the page cache
cannot hold the model. --peer runs COMMAND in turns with ours, each in a new process under the same
cap. It must print one JSON line with `peer`, `prefill_s`, `decode_tok_s`, `read_mb_per_pass`,
`peak_anon_mb` and `tokens`, for the same checkpoint and prompt.

The last line on stdout is the result as JSON; the report for people goes to stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import ollm
from benchmarks import MODELS
from benchmarks.disk.disk import probe
from benchmarks.tools.children import ChildError, result_of, script
from benchmarks.tools.cold import (
    ColdFiles,
    Counts,
    PeakAnonymousMemory,
    checkpoint_files,
    drop_from_cache,
    told,
)
from benchmarks.tools.make_checkpoint import Shape, write_checkpoint
from benchmarks.tools.measure import environment, random_prompt, timed_generate

DEFAULT_CHECKPOINT = MODELS / "random-llama"


_RING_BLOCKS = 16
"""Blocks of 16 MiB: memory that no cache holds, as much as a ring of three 90 MB layers takes."""


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """One run in this process, between two probes of the disk."""
    files = checkpoint_files(args.checkpoint)
    load_average = os.getloadavg()[0]
    before, ring_before = probe(files), probe(files, num_blocks=_RING_BLOCKS)
    started = time.perf_counter()
    with (
        PeakAnonymousMemory() as anonymous,
        ollm.load(
            args.checkpoint,
            device="cpu",
            dtype="auto",
            device_memory=args.device_memory,
            kv=args.kv,
            attention=args.attention,
        ) as model,
    ):
        load_seconds = time.perf_counter() - started
        dropping, start = ColdFiles(files, warm=args.warm), Counts.now()
        timing = timed_generate(
            model,
            random_prompt(args.prompt),
            args.new,
            snapshot=lambda: (Counts.now(), model.stats),
            between_tokens=dropping,
        )
        stats = model.stats
    after, ring_after = probe(files), probe(files, num_blocks=_RING_BLOCKS)

    counts = [start, *(counted for counted, _ in timing.snapshots)]
    first, last = timing.snapshots[0][1], timing.snapshots[-1][1]
    passes = last.weight_passes - first.weight_passes
    kernel_bytes = counts[-1].read_bytes - counts[1].read_bytes
    engine_bytes = last.weight_bytes_read - first.weight_bytes_read
    read_seconds = last.read_seconds - first.read_seconds
    limit = (before.gb_per_second + after.gb_per_second) / 2
    ring_limit = (ring_before.gb_per_second + ring_after.gb_per_second) / 2
    decode_rate = kernel_bytes / timing.decode_seconds / 1e9
    reader_rate = engine_bytes / read_seconds / 1e9 if read_seconds else 0.0
    return {
        **told("ollm-core", args.prompt, timing, counts, dropping, anonymous.num_bytes),
        "load_seconds": round(load_seconds, 3),
        "dropping_seconds": round(timing.dropping_seconds, 4),
        "weight_bytes": stats.weight_bytes,
        "resident_bytes": stats.resident_bytes,
        "streamed_bytes": stats.weight_bytes - stats.resident_bytes,
        "decode_passes": passes,
        "kernel_bytes_per_decode_pass": kernel_bytes // passes,
        "engine_bytes_per_decode_pass": engine_bytes // passes,
        "disk_limit_gb_s": [round(rate.gb_per_second, 3) for rate in (before, after)],
        "ring_limit_gb_s": [round(r.gb_per_second, 3) for r in (ring_before, ring_after)],
        "disk_limit_direct": before.direct,
        "decode_share_of_limit": round(decode_rate / limit, 3),
        "decode_share_of_ring_limit": round(decode_rate / ring_limit, 3),
        "reader_gb_s": round(reader_rate, 3),
        "reader_share_of_limit": round(reader_rate / limit, 3),
        "reader": stats.reader,
        "attention": stats.attention,
        "chunk_size": first.chunk_size,
        "kv_tier": stats.kv_tier,
        "device_limit_bytes": stats.device_limit_bytes,
        "device_peak_bytes": stats.device_peak_bytes,
        "host_peak_bytes": stats.host_peak_bytes,
        "load_average": round(load_average, 2),
    }


def report(run: dict[str, Any]) -> None:
    """What one run of ours showed, for people."""

    def gb(name: str) -> str:
        return f"{run[name] / 1e9:.3f}"

    before, after = run["disk_limit_gb_s"]
    ring_before, ring_after = run["ring_limit_gb_s"]
    _say(
        f"disk limit     {before:.2f} GB/s before, {after:.2f} after, into one 16 MiB block\n"
        f"               {ring_before:.2f} GB/s before, {ring_after:.2f} after, into 256 MiB\n"
        f"prefill        {run['prefill_s']:.2f} s for {run['prompt']} tokens\n"
        f"decode         {run['decode_tok_s']:.2f} tokens/s\n"
        f"read per pass  {gb('kernel_bytes_per_decode_pass')} GB (kernel), "
        f"{gb('engine_bytes_per_decode_pass')} GB (ours); "
        f"{gb('streamed_bytes')} GB of {gb('weight_bytes')} is not resident\n"
        f"while decoding {run['decode_gb_s']:.2f} GB/s, "
        f"{run['decode_share_of_limit']:.0%} of the first limit, "
        f"{run['decode_share_of_ring_limit']:.0%} of the second; "
        f"the reader alone {run['reader_gb_s']:.2f}, {run['reader_share_of_limit']:.0%}\n"
        f"memory         {gb('device_peak_bytes')} of {gb('device_limit_bytes')} GB accounted, "
        f"{run['peak_anon_mb']} MiB anonymous at most"
    )


def in_new_process(command: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """Run `command` cold, under the cap if there is one; returns the last JSON line it prints."""
    drop_from_cache(path for path in args.checkpoint.rglob("*") if path.is_file())
    try:
        return result_of(command, cap=args.cap)
    except ChildError as error:
        raise SystemExit(f"{error}: {shlex.join(command)}") from error


def in_turns(args: argparse.Namespace) -> dict[str, Any]:
    """Ours and the peer's runs, A B A B, and how they compare."""
    own = [*script("decode"), str(args.checkpoint)]
    for name in ("prompt", "new", "device_memory", "kv", "attention"):
        own += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    own += ["--warm"] * args.warm
    runs, peer_runs = [], []
    for _ in range(args.rounds):
        runs.append(in_new_process(own, args))
        if args.peer:
            peer_runs.append(in_new_process(shlex.split(args.peer), args))
            _say(_side_by_side(runs[-1], peer_runs[-1]))
    if not args.peer:
        return {"runs": runs}
    pairs = list(zip(runs, peer_runs, strict=True))
    return {
        "runs": runs,
        "peer_runs": peer_runs,
        "decode_ratios": [round(a["decode_tok_s"] / b["decode_tok_s"], 3) for a, b in pairs],
        "prefill_ratios": [round(b["prefill_s"] / a["prefill_s"], 3) for a, b in pairs],
        "same_tokens": all(a["tokens"] == b["tokens"] for a, b in pairs),
    }


def _side_by_side(ours: dict[str, Any], peer: dict[str, Any]) -> str:
    rows = [f"{'':20}{'ollm-core':>12}{peer['peer']:>14}{'ratio':>9}"]
    for name, more_is_better in (
        ("prefill_s", False),
        ("decode_tok_s", True),
        ("read_mb_per_pass", False),
        ("peak_anon_mb", False),
    ):
        a, b = ours[name], peer[name]
        ratio = (a / b if more_is_better else b / a) if a and b else float("nan")
        rows.append(f"{name:20}{a:12.3f}{b:14.3f}{ratio:8.2f}x")
    same = "the same" if ours["tokens"] == peer["tokens"] else "DIFFERENT"
    return "\n".join([*rows, f"tokens: {same}"])


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Prefill and decode beside the disk's own limit.")
    parser.add_argument("checkpoint", type=Path, nargs="?", default=DEFAULT_CHECKPOINT)
    parser.add_argument("--prompt", type=int, default=128, help="prompt tokens")
    parser.add_argument("--new", type=int, default=6, help="new tokens, at least 2")
    parser.add_argument("--device-memory", default="1100MB")
    parser.add_argument("--kv", default="device", help="auto, device, host or disk")
    parser.add_argument("--attention", default="auto", help="auto, exact or blockwise")
    parser.add_argument("--warm", action="store_true", help="leave the page cache alone")
    parser.add_argument("--cap", type=int, help="MiB of memory for each run, page cache included")
    parser.add_argument("--peer", help="command of another program to measure in turns with ours")
    parser.add_argument("--rounds", type=int, default=2, help="with --cap or --peer")
    parser.add_argument("--json", type=Path, help="write the record to this file")
    args = parser.parse_args()
    if args.new < 2:
        parser.error("--new must be at least 2: the first token is the prefill's")
    if args.checkpoint == DEFAULT_CHECKPOINT and not (args.checkpoint / "config.json").exists():
        _say(f"writing {args.checkpoint}, 2.57 GB")
        write_checkpoint(args.checkpoint, Shape())
    if args.cap or args.peer:
        results = in_turns(args)
    else:
        results = {"runs": [measure(args)]}
        report(results["runs"][0])
    if args.json:
        config = json.loads((args.checkpoint / "config.json").read_text())
        record = {
            **environment(args.checkpoint),
            "cache": "warm" if args.warm else "dropped before every weight pass",
            "model": {
                name: config[name]
                for name in config
                if name.endswith(("_type", "size", "layers", "heads"))
            },
            **results,
        }
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(results["runs"][-1]))
    if not results.get("same_tokens", True):
        raise SystemExit("the peer's tokens are not ours")


if __name__ == "__main__":
    main()
