"""All weights on the card: ours beside transformers itself, in turns, with the same tokens."""

from __future__ import annotations

import json
from statistics import mean

import torch

from benchmarks.decode import resident as contests
from benchmarks.gpu.parts.checkpoints import LLAMA, Checkpoint, cut, llama
from benchmarks.gpu.parts.work import OutOfTime, Tell, Work

_PART_OF_CARD = 0.4  # for each of the two; the rest is for KV and what comes and goes


def run(work: Work, tell: Tell, _: str = "") -> None:
    """A long and a short prompt through as many layers of Llama-3-8B as fit twice. Raises
    OutOfTime.
    """
    whole = llama(work)
    checkpoint = cut(work, whole, LLAMA, _layers_that_fit(work, whole))
    config = json.loads((checkpoint.path / "config.json").read_text())
    lengths = (16,) if work.small else (128, 2048)
    for number, num_tokens in enumerate(lengths):
        if work.seconds_left < 10:
            raise OutOfTime(f"prompts of {num_tokens} tokens were not compared")
        contest = contests.Contest(
            work.device,
            num_tokens,
            num_new=4 if work.small else 32,
            rounds=2 if work.small else 4,
            vocab_size=config["vocab_size"],
            seconds=(work.seconds_left - 5) / (len(lengths) - number) / 2,
        )
        found = contests.compare(checkpoint.path, "bfloat16", contest)
        decode, prefill = mean(found["decode_ratios"]), mean(found["prefill_ratios"])
        same = found["same_tokens"]
        tell(
            f"{num_tokens} tokens of prompt",
            f"{checkpoint.num_layers} layers: decode {1 / mean(found['token_seconds']):.1f} "
            f"tokens/s, {decode:.2f} times transformers; prefill "
            f"{mean(found['prefill_seconds']):.3f} s, {prefill:.2f} times; tokens "
            f"{'the same' if same else 'DIFFERENT'}",
            fault="" if same else "tokens differ from those of transformers",
            num_layers=checkpoint.num_layers,
            **found,
        )


def _layers_that_fit(work: Work, whole: Checkpoint) -> int:
    if not work.on_card:
        return whole.num_layers
    room = int(torch.cuda.mem_get_info(work.device)[0] * _PART_OF_CARD)
    rest = whole.num_bytes - whole.num_layers * whole.layer_bytes
    return max(min((room - rest) // whole.layer_bytes, whole.num_layers), 1)
