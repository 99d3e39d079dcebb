"""Decode of a model beside the same with its weights compressed, in turns, at several disk rates.

usage: compressed.py [CHECKPOINT] [--work DIR] [--rates 0 0.5] [--rounds 2] [--new 5]
                     [--device-memory 450MB] [--json FILE]

CHECKPOINT is bf16; without one, a random Llama of some 1 GB is written below --work, whose weights
have the exponents of real ones (normal numbers of one scale: 2.55 bits; SmolLM2's: 2.59). The
compressed model goes there too, by `ollm convert`. A rate is in GB/s, 0 the disk's own; others are
enforced by the kernel (throttle.py, needs root). Both models get the same memory and the same
prompt; they are dropped from the page cache before every pass, outside the measured time.

The last line on stdout is the result as JSON; the report for people goes to stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

import ollm
from benchmarks import MODELS
from benchmarks.tools.make_checkpoint import Shape, write_checkpoint
from benchmarks.tools.measure import (
    checkpoint_files,
    drop_from_cache,
    environment,
    finish,
    random_prompt,
    timed_generate,
)
from benchmarks.tools.throttle import throttled
from ollm_core.checkpoint.safetensors import open_checkpoint, read_config
from ollm_core.convert.compress import convert
from ollm_core.device.buffers import as_memoryview
from ollm_core.plugins.factories import CodecRequest
from ollm_core.weights.formats.compressed import compressed_weights

SHAPE = Shape(layers=11, vocab=16384)
PROMPT = 16


def measure(directory: Path, args: argparse.Namespace) -> dict[str, Any]:
    """One opened model: a prompt, then `--new` tokens, each a cold weight pass."""
    files = checkpoint_files(directory)
    vocab = int(read_config(directory)["vocab_size"])
    with ollm.load(
        directory, device="cpu", device_memory=args.device_memory, kv="device", attention="exact"
    ) as model:
        timing = timed_generate(
            model,
            random_prompt(PROMPT) % vocab,
            args.new,
            snapshot=lambda: (time.process_time(), model.stats),
            between_tokens=lambda: drop_from_cache(files),
        )
    (cpu_first, first), (cpu_last, last) = timing.snapshots[0], timing.snapshots[-1]
    passes = last.weight_passes - first.weight_passes
    read = last.weight_bytes_read - first.weight_bytes_read
    return {
        "seconds_per_token": round(timing.decode_seconds / passes, 4),
        "cpu_seconds_per_token": round((cpu_last - cpu_first) / passes, 4),
        "read_bytes_per_token": read // passes,
        "read_gb_s": round(read / (last.read_seconds - first.read_seconds) / 1e9, 3),
        "resident_bytes": last.resident_bytes,
        "device_peak_bytes": last.device_peak_bytes,
        "reader": last.reader,
        "tokens": timing.tokens,
    }


def decode_rate(directory: Path, num_threads: int) -> dict[str, float]:
    """GB of bf16 a second that one layer's tensors are decoded at, by the clock and by the
    processor's, with the bytes in memory; the best of five.
    """
    checkpoint = open_checkpoint(directory)
    torch.set_num_threads(num_threads)
    encoded = compressed_weights(CodecRequest({}, checkpoint.tensors, checkpoint.metadata))
    layer = [e for name, e in encoded.items() if ".layers.1." in name]
    stored = [[_read(checkpoint.tensors[name]) for name in e.tensors] for e in layer]
    num_bytes = sum(2 * parts[1].numel() for parts in stored)
    best = {"wall_gb_s": 0.0, "cpu_gb_s": 0.0}
    for _ in range(5):
        wall, cpu = time.perf_counter(), time.process_time()
        for one, parts in zip(layer, stored, strict=True):
            one.decode(*parts)
        took = time.perf_counter() - wall, time.process_time() - cpu
        for name, seconds in zip(best, took, strict=True):
            best[name] = max(best[name], round(num_bytes / seconds / 1e9, 3))
    return best


def _read(info: Any) -> torch.Tensor:
    raw = torch.empty(info.num_bytes, dtype=torch.uint8)
    with info.path.open("rb") as file:
        file.seek(info.offset)
        file.readinto(as_memoryview(raw))
    return raw.view(info.shape)


def main() -> None:
    parser = argparse.ArgumentParser(description="Original against compressed weights.")
    parser.add_argument("checkpoint", nargs="?", type=Path)
    parser.add_argument("--work", type=Path, default=MODELS)
    parser.add_argument("--rates", nargs="+", type=float, default=[0.0, 0.5])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--new", type=int, default=5)
    parser.add_argument("--device-memory", default="450MB")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    original = args.checkpoint or args.work / "random-llama-1gb"
    if not (original / "config.json").is_file():
        write_checkpoint(original, SHAPE)
    started = time.perf_counter()
    made = convert(original, args.work / f"{original.name}-compressed")
    convert_seconds = time.perf_counter() - started
    os.sync()
    threads = torch.get_num_threads()
    result: dict[str, Any] = {
        **environment(original),
        "threads": threads,
        "original_bytes": made.original_bytes,
        "compressed_bytes": made.stored_bytes,
        "convert_seconds": None if made.num_found else round(convert_seconds, 1),
        "device_memory": args.device_memory,
        "prompt": PROMPT,
        "decode": {str(n): decode_rate(made.path, n) for n in (1, threads)},
        "runs": [],
    }
    torch.set_num_threads(threads)
    for rate in args.rates:
        for _ in range(args.rounds):
            for name, directory in (("original", original), ("compressed", made.path)):
                load = os.getloadavg()[0]
                with throttled(original, int(rate * 1e9)):
                    run = measure(directory, args)
                run = {"weights": name, "disk_limit_gb_s": rate, "load_average": load, **run}
                result["runs"].append(run)
                print(json.dumps(run), file=sys.stderr, flush=True)
    result["same_tokens"] = len({tuple(run["tokens"]) for run in result["runs"]}) == 1
    result["times_as_fast"] = {str(rate): _ratio(result["runs"], rate) for rate in args.rates}
    finish(result, args.json)
    if not result["same_tokens"]:
        raise SystemExit("the tokens differ")


def _ratio(runs: list[dict[str, Any]], rate: float) -> float:
    """The original's median seconds for a token by those of the compressed model."""
    of = {
        name: statistics.median(
            run["seconds_per_token"]
            for run in runs
            if run["weights"] == name and run["disk_limit_gb_s"] == rate
        )
        for name in ("original", "compressed")
    }
    return round(of["original"] / of["compressed"], 3)


if __name__ == "__main__":
    main()
