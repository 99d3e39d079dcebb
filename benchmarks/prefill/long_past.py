"""Decode steps after a long past, with its KV on each tier, beside the disk's own rate.

usage: long_past.py CHECKPOINT [--past 32768] [--dtype bfloat16] [--kv-dir DIR]
                    [--ways device:6GB disk:3400MB disk:1200MB] [--steps 6] [--rounds 2]
                    [--json FILE]

A way is where KV lies, and the memory of the device.

The past is random keys and values, put into the store without a prompt: what a step takes does not
depend on them. Each way to run it opens the model anew, in turns; the first step of each, which
reads what stays in memory, is left out. Reading is O_DIRECT, past the page cache.

The last line on stdout is the record as JSON; the report for people goes to stderr.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import ollm
from benchmarks.disk.disk import probe
from benchmarks.tools.measure import checkpoint_files, environment, finish
from ollm_core.contracts.kv import KVStore
from ollm_core.engine.batch import NewTokens

PIECE = 4096


def fill(store: KVStore, sequence: int, kinds: Any, num_tokens: int, dtype: torch.dtype) -> None:
    """Random keys and values, the same for all pieces of a layer."""
    for end in range(PIECE, num_tokens + PIECE, PIECE):
        length = min(end, num_tokens)
        count = length - store.num_tokens(sequence)
        store.reserve(sequence, length, count)
        for layer_idx, kind in enumerate(kinds):
            keys, values = torch.randn(2, kind.num_kv_heads, count, kind.head_dim).to(dtype)
            store.append(layer_idx, sequence, keys, values)
        store.commit(sequence)


def steps(model: Any, args: argparse.Namespace) -> Iterator[dict[str, float]]:
    """Each step after the first: seconds and bytes."""
    cache, engine = model.new_cache(), model.engine
    store = cache.store
    sequence = store.new_sequence()
    geometry = store.geometry
    fill(store, sequence, geometry.kinds, args.past, geometry.dtype)
    token = torch.ones(1, dtype=torch.long)
    for step in range(args.steps + 1):
        before, kv_before, start = model.stats, store.bytes_read, time.perf_counter()
        engine.run(store, [NewTokens(sequence, token, args.past + step)])
        seconds = time.perf_counter() - start
        if step:
            weight_bytes = model.stats.weight_bytes_read - before.weight_bytes_read
            yield {
                "seconds": seconds,
                "weight_bytes": weight_bytes,
                "kv_bytes": store.bytes_read - kv_before,
            }
    cache.close()


def run(args: argparse.Namespace, kv: str, memory: str, directory: str) -> dict[str, Any]:
    """One way to run it."""
    files = checkpoint_files(args.checkpoint)
    limit = probe(files).gb_per_second
    with ollm.load(
        args.checkpoint,
        device="cpu",
        device_memory=memory,
        host_memory=args.host_memory,
        dtype=args.dtype,
        reader="direct",
        attention="blockwise",
        kv=kv,
        kv_dir=directory if kv == "disk" else None,
        keep_kv=False,
    ) as model:
        found = list(steps(model, args))
        resident = model.stats.resident_bytes
    seconds = statistics.median(step["seconds"] for step in found)
    num_bytes = statistics.median(step["weight_bytes"] + step["kv_bytes"] for step in found)
    return {
        "kv": kv,
        "device_memory": memory,
        "resident_bytes": resident,
        "seconds": round(seconds, 3),
        "gb_per_second": round(num_bytes / seconds / 1e9, 2),
        "disk_limit_gb_s": round(limit, 2),
        "steps": found,
    }


def main() -> None:
    """Measure, and print the record."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--past", type=int, default=32768, help="tokens")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--ways", nargs="+", default=["device:6GB", "disk:3400MB", "disk:1200MB"])
    parser.add_argument("--host-memory", default="6GB")
    parser.add_argument("--kv-dir", type=Path, help="a disk [default: where the checkpoint is]")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the record to this file")
    args = parser.parse_args()
    runs = []
    with tempfile.TemporaryDirectory(dir=args.kv_dir or args.checkpoint.parent) as directory:
        for way in args.ways * args.rounds:
            kv, _, memory = way.partition(":")
            runs.append(run(args, kv, memory, directory))
            told = {key: value for key, value in runs[-1].items() if key != "steps"}
            print(told, file=sys.stderr, flush=True)
    record = {
        **environment(args.checkpoint),
        "past_tokens": args.past,
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "runs": runs,
    }
    finish(record, args.json)


if __name__ == "__main__":
    main()
