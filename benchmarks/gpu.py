"""Check and measure on a CUDA device: a streamed model against the same one held on the card.

usage: gpu.py [--layers 8] [--device-memory 4GB] [--prompt 512] [--new 16] [--directory DIR]

Writes a random bf16 Llama with the layer shapes of Llama-3-8B into a temporary directory (5.6 GB
with 8 layers; put it on a real disk with --directory), runs it within --device-memory and then with
plain transformers, and writes what it saw to benchmarks/results/gpu-CARD-DATE.json. Ends with 1 if
the tokens differ or the memory was exceeded. Without a CUDA device it says so and ends with 0.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from disk import probe
from make_checkpoint import Shape, write_checkpoint
from measure import (
    Timing,
    checkpoint_files,
    drop_from_cache,
    environment,
    random_prompt,
    timed_generate,
)
from transformers import AutoModelForCausalLM

import ollm

DEVICE = "cuda:0"
RESULTS = Path(__file__).resolve().parent / "results"


def streamed(checkpoint: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Run through oLLM within the budget, cold, between two probes of the disk."""
    files = checkpoint_files(checkpoint)
    before = probe(files)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    with ollm.load(
        checkpoint, device=DEVICE, device_memory=args.device_memory, kv="device", attention="exact"
    ) as model:
        timing = timed_generate(
            model,
            random_prompt(args.prompt).to(DEVICE),
            args.new,
            snapshot=lambda: model.stats,
            between_tokens=lambda: drop_from_cache(files),
        )
        stats = model.stats
    allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    after = probe(files)
    first, last = timing.snapshots[0], timing.snapshots[-1]
    decode_bytes = last.weight_bytes_read - first.weight_bytes_read
    limit = (before.gb_per_second + after.gb_per_second) / 2
    rate = decode_bytes / timing.decode_seconds / 1e9
    return {
        **_timed(timing),
        "weight_bytes": stats.weight_bytes,
        "resident_bytes": stats.resident_bytes,
        "bytes_read_per_decode_pass": decode_bytes // (last.weight_passes - first.weight_passes),
        "disk_limit_gb_s": [round(before.gb_per_second, 3), round(after.gb_per_second, 3)],
        "disk_limit_direct": before.direct,
        "decode_gb_s": round(rate, 3),
        "decode_share_of_limit": round(rate / limit, 3),
        "device_limit_bytes": stats.device_limit_bytes,
        "device_peak_bytes": stats.device_peak_bytes,
        "cuda_max_allocated_bytes": allocated,
        "cuda_max_reserved_bytes": reserved,
        "within_budget": allocated <= stats.device_limit_bytes,
        "host_peak_bytes": stats.host_peak_bytes,
        "reader": stats.reader,
        "attention": stats.attention,
        "chunk_size": first.chunk_size,
    }


def held_on_the_card(checkpoint: Path, args: argparse.Namespace, chunk_size: int) -> dict[str, Any]:
    """The same prompt through plain transformers, all weights on the card, with the same chunks."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    model: Any = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.bfloat16, attn_implementation="eager"
    )
    model = model.to(DEVICE).eval()
    chunks = {"prefill_chunk_size": chunk_size} if chunk_size < args.prompt else {}
    timing = timed_generate(
        model,
        random_prompt(args.prompt).to(DEVICE),
        args.new,
        snapshot=lambda: None,
        between_tokens=lambda: None,
        **chunks,
    )
    return {**_timed(timing), "cuda_max_allocated_bytes": torch.cuda.max_memory_allocated()}


def _timed(timing: Timing[Any]) -> dict[str, Any]:
    return {
        "prefill_seconds": round(timing.prefill_seconds, 4),
        "decode_tokens_per_second": round(timing.decode_tokens_per_second, 4),
        "tokens": timing.tokens,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Streamed against held on the card, on CUDA.")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--device-memory", default="4GB")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=16)
    parser.add_argument("--directory", type=Path, help="where to put the temporary checkpoint")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: nothing to measure")
        return
    shape = Shape(
        hidden=4096, intermediate=14336, layers=args.layers, heads=32, kv_heads=8, vocab=128256
    )
    with tempfile.TemporaryDirectory(prefix="ollm-gpu-", dir=args.directory) as directory:
        checkpoint = Path(directory)
        write_checkpoint(checkpoint, shape, DEVICE)
        ours = streamed(checkpoint, args)
        reference = held_on_the_card(checkpoint, args, ours["chunk_size"])
        where = environment(checkpoint)
    card = torch.cuda.get_device_properties(DEVICE)
    same_tokens = ours["tokens"] == reference["tokens"]
    record = {
        **where,
        "card": {
            "name": card.name,
            "memory_bytes": card.total_memory,
            "capability": f"{card.major}.{card.minor}",
            "cuda": torch.version.cuda,
        },
        "model": shape.config(),
        "prompt": args.prompt,
        "new": args.new,
        "cache": "dropped before every weight pass",
        "streamed": ours,
        "held_on_the_card": reference,
        "same_tokens": same_tokens,
    }
    slug = re.sub(r"[^a-z0-9]+", "-", card.name.lower()).strip("-")
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"gpu-{slug}-{where['date']}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(
        f"{card.name}: tokens {'the same' if same_tokens else 'DIFFERENT'}; "
        f"decode {ours['decode_tokens_per_second']:.2f} tokens/s, {ours['decode_gb_s']:.2f} GB/s, "
        f"{ours['decode_share_of_limit']:.0%} of the disk's limit; "
        f"{ours['cuda_max_allocated_bytes'] / 1e9:.3f} GB allocated, "
        f"{ours['device_peak_bytes'] / 1e9:.3f} accounted, "
        f"{ours['device_limit_bytes'] / 1e9:.3f} allowed\n{path}"
    )
    if not (same_tokens and ours["within_budget"]):
        sys.exit(1)


if __name__ == "__main__":
    main()
