"""A pass over rows that were forked from one document: each block that they share read once for all
of them, against once for each row.

usage: shared_prefix.py CHECKPOINT [--past 8192] [--rows 16] [--kv device disk]
                        [--dtypes bfloat16 float32] [--rounds 5] [--device-memory 6GB]
                        [--kv-dir DIR] [--json FILE]

Two passes: a decode step, and the questions' own, 20 to 60 tokens a row. The document is random
keys and values, put into the store without a prompt: what a pass takes does not depend on them.
With and without go in turns on one store, which is cut back after each pass; times are medians, and
both must give the same greedy tokens in float32. Files of KV are read with O_DIRECT, past the page
cache.

The last line on stdout is the record as JSON; the report for people goes to stderr.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import ollm
from benchmarks.prefill.long_past import fill
from benchmarks.tools.measure import environment, finish
from ollm_core.contracts.kv import KVStore, SharedRun
from ollm_core.engine.batch import NewTokens

SHORTEST, LONGEST = 20, 60
"""Tokens of a question."""


class Switch:
    """Lets a store say what is shared, or not."""

    def __init__(self, store: KVStore) -> None:
        self.on = True
        self._real = store.shared_runs
        store.shared_runs = self._said  # type: ignore[method-assign]

    def _said(self, *arguments: Any) -> Sequence[SharedRun]:
        return self._real(*arguments) if self.on else ()


def passes(past: int, rows: Sequence[int]) -> Mapping[str, list[NewTokens]]:
    """Work by the pass's name."""
    generator = torch.Generator().manual_seed(0)

    def work(lengths: Sequence[int]) -> list[NewTokens]:
        return [
            NewTokens(row, torch.randint(10, 199, (length,), generator=generator), past)
            for row, length in zip(rows, lengths, strict=True)
        ]

    last = max(len(rows) - 1, 1)
    questions = [SHORTEST + (LONGEST - SHORTEST) * number // last for number in range(len(rows))]
    return {"step": work([1] * len(rows)), "questions": work(questions)}


def run(args: argparse.Namespace, kv: str, dtype: str, directory: str) -> list[dict[str, Any]]:
    """Both passes, with and without, on one tier and in one dtype."""
    found = []
    with ollm.load(
        args.checkpoint,
        device="cpu",
        device_memory=args.device_memory,
        host_memory=args.device_memory,
        dtype=dtype,
        attention="blockwise",
        kv=kv,
        kv_dir=directory if kv == "disk" else None,
        keep_kv=False,
    ) as model:
        cache = model.new_cache()
        store, geometry = cache.store, cache.store.geometry
        document = store.new_sequence()
        fill(store, document, geometry.kinds, args.past, geometry.dtype)
        rows = [store.fork(document) for _ in range(args.rows)]
        switch = Switch(store)
        for name, work in passes(args.past, rows).items():
            seconds: dict[bool, list[float]] = {True: [], False: []}
            read, tokens = {}, {}
            for number in range(args.rounds + 1):
                for shares in (True, False):
                    switch.on = shares
                    before, start = store.bytes_read, time.perf_counter()
                    logits = model.engine.run(store, work)
                    if number:  # in the first, weights are loaded and memory is new
                        seconds[shares].append(time.perf_counter() - start)
                    read[shares] = store.bytes_read - before
                    tokens[shares] = [int(row[-1].argmax()) for row in logits]
                    for item in work:
                        store.truncate(item.sequence, item.start)
            medians = {shares: statistics.median(times) for shares, times in seconds.items()}
            found.append(
                {
                    "kv": kv,
                    "dtype": dtype,
                    "pass": name,
                    "seconds_shared": round(medians[True], 3),
                    "seconds_apart": round(medians[False], 3),
                    "times_as_fast": round(medians[False] / medians[True], 2),
                    "kv_bytes_shared": read[True],
                    "kv_bytes_apart": read[False],
                    "same_tokens": tokens[True] == tokens[False],
                    "all_seconds": {"shared": seconds[True], "apart": seconds[False]},
                }
            )
            told = {key: value for key, value in found[-1].items() if key != "all_seconds"}
            print(told, file=sys.stderr, flush=True)
        cache.close()
    return found


def main() -> None:
    """Measure, and print the record."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--past", type=int, default=8192, help="tokens of the document")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--kv", nargs="+", default=["device", "disk"])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device-memory", default="6GB")
    parser.add_argument("--kv-dir", type=Path, help="a disk [default: where the checkpoint is]")
    parser.add_argument("--json", type=Path, help="write the record to this file")
    args = parser.parse_args()
    runs = []
    with tempfile.TemporaryDirectory(dir=args.kv_dir or args.checkpoint.parent) as directory:
        for dtype in args.dtypes:
            for kv in args.kv:
                runs += run(args, kv, dtype, directory)
    same = all(run["same_tokens"] for run in runs if run["dtype"] == "float32")
    record = {
        **environment(args.checkpoint),
        "past_tokens": args.past,
        "rows": args.rows,
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "same_tokens": same,
        "runs": runs,
    }
    finish(record, args.json)
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
