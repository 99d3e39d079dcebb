"""The cost of the engine where nothing is streamed: ours beside transformers itself, in turns.

usage: resident.py [CHECKPOINT ...] [--precision exact] [--rounds 4] [--new 32] [--json FILE]

CHECKPOINT is models/smollm2-135M by default. Both have all weights in memory, transformers attends
eagerly. With precision exact both give the same tokens (exit code 1 if not). The first round warms
both up and is left out. A token's time is the median over a round.

The last line on stdout is the record as JSON; the report for people goes to stderr.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import ollm
from benchmarks import MODELS
from benchmarks.tools.measure import environment, finish, random_prompt, timed_generate
from ollm_conformance.forms import reference_options
from ollm_core.checkpoint.safetensors import read_config
from ollm_core.device.dtypes import DTYPES

MODEL = MODELS / "smollm2-135M"
PROMPT = 128


@dataclass(frozen=True, slots=True)
class Contest:
    """How both are run."""

    device: str = "cpu"
    num_tokens: int = PROMPT
    """Of the prompt, which is one chunk."""
    precision: str = "exact"
    """Ours."""
    num_new: int = 32
    """At least 2."""
    rounds: int = 4
    vocab_size: int = 49_152
    seconds: float = math.inf
    """After which no other round begins, if two have been measured."""


def timed(model: Any, contest: Contest) -> tuple[float, float, list[int]]:
    """Seconds of the prompt and of a token, and the tokens."""
    timing = timed_generate(
        model,
        (random_prompt(contest.num_tokens) % contest.vocab_size).to(contest.device),
        contest.num_new,
        snapshot=lambda: None,
        between_tokens=lambda: None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return timing.prefill_seconds, median(timing.step_seconds), timing.tokens


def compare(checkpoint: Path, dtype: str, contest: Contest) -> dict[str, Any]:
    """All rounds of one model in one dtype, ours first in every other."""
    plain: Any = AutoModelForCausalLM.from_pretrained(
        checkpoint,
        dtype=DTYPES[dtype],
        attn_implementation="eager",
        experts_implementation="eager",
        trust_remote_code=False,
        **reference_options(read_config(checkpoint)),
    )
    plain = plain.eval().to(contest.device)
    rounds: list[tuple[Any, Any]] = []
    started = time.monotonic()
    with ollm.load(
        checkpoint,
        device=contest.device,
        dtype=dtype,
        kv="device",
        precision=contest.precision,
        chunk_size=contest.num_tokens,
    ) as model:
        while len(rounds) < contest.rounds + 1:
            if len(rounds) > 2 and time.monotonic() - started > contest.seconds:
                break
            if len(rounds) % 2:
                theirs, ours = timed(plain, contest), timed(model, contest)
            else:
                ours, theirs = timed(model, contest), timed(plain, contest)
            rounds.append((ours, theirs))
        stats = model.stats
    rounds = rounds[1:]
    prefill = [theirs[0] / ours[0] for ours, theirs in rounds]
    decode = [theirs[1] / ours[1] for ours, theirs in rounds]
    record = {
        "model": checkpoint.name,
        "dtype": dtype,
        "device": contest.device,
        "prompt_tokens": contest.num_tokens,
        "weight_bytes": stats.weight_bytes,
        "resident_bytes": stats.resident_bytes,
        "streamed_bytes": stats.weight_bytes_read,
        "chunk_size": stats.chunk_size,
        "token_seconds": [round(ours[1], 5) for ours, _ in rounds],
        "transformers_token_seconds": [round(theirs[1], 5) for _, theirs in rounds],
        "prefill_seconds": [round(ours[0], 3) for ours, _ in rounds],
        "transformers_prefill_seconds": [round(theirs[0], 3) for _, theirs in rounds],
        "decode_ratios": [round(ratio, 3) for ratio in decode],
        "prefill_ratios": [round(ratio, 3) for ratio in prefill],
        "tokens": rounds[0][0][2],
        "transformers_tokens": rounds[0][1][2],
        "same_tokens": all(ours[2] == theirs[2] for ours, theirs in rounds),
        "load_average": round(os.getloadavg()[0], 2),
    }
    print(
        f"{checkpoint.name}, {dtype}: decode {mean(decode):.2f} ({min(decode):.2f} to "
        f"{max(decode):.2f}), prefill {mean(prefill):.2f} ({min(prefill):.2f} to "
        f"{max(prefill):.2f}) times as fast as transformers",
        file=sys.stderr,
        flush=True,
    )
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description="Ours beside transformers, all in memory.")
    parser.add_argument("checkpoints", type=Path, nargs="*", default=[MODEL], metavar="CHECKPOINT")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--precision", default="exact", help="ours: exact or fast")
    parser.add_argument("--new", type=int, default=32, help="new tokens, at least 2")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], choices=DTYPES)
    parser.add_argument("--json", type=Path, help="write the record to this file")
    args = parser.parse_args()
    contest = Contest(num_new=args.new, rounds=args.rounds, precision=args.precision)
    runs = [compare(path, dtype, contest) for path in args.checkpoints for dtype in args.dtypes]
    record = {
        **environment(args.checkpoints[0]),
        "threads": torch.get_num_threads(),
        "precision": args.precision,
        "prompt_tokens": PROMPT,
        "new_tokens": args.new,
        "runs": runs,
    }
    finish(record, args.json)
    if args.precision == "exact" and not all(run["same_tokens"] for run in runs):
        raise SystemExit("the tokens differ")


if __name__ == "__main__":
    main()
