"""What a weight pass costs by the number of tokens that it checks, and what drafts bring.

usage: drafts.py MODEL [--adapter benchmarks.experts.moefy:Qwen2Moe] [--device-memory SIZE]
                 [--draft-model DIR] [--json FILE]

Two tables. The first: passes over 1, 2, 3, 5 and 9 tokens of a text, in turns, each going on where
the one before ended; seconds, bytes and experts read, the median of each. The second: the same
prompts answered without drafts, with the gate and with ten tokens always, in turns, in tokens a
second of decoding, by the engine's clock, and in tokens per weight pass. Prompts are one that asks
for a quotation, one for a change of a word and one for free text; for a model without a tokenizer,
random tokens. The draft source is the lookup, or with --draft-model that model.

With --chance P the draft source is not the lookup but one that knows the text and is right with
that chance at each token: real costs, simulated worth.

Weights are read with O_DIRECT by default, past the page cache. The last line on stdout is the
result as JSON; the report for people goes to stderr.
"""

from __future__ import annotations

import argparse
import importlib
import os
import random
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ollm
from benchmarks.disk.disk import probe
from benchmarks.tools.measure import checkpoint_files, environment, finish, random_prompt
from ollm_core.engine.batch import NewTokens
from ollm_core.plugins.registry import Registry

CHECKED = (1, 2, 3, 5, 9)
PASSAGE = (
    "The keeper of the northern light wrote down what he saw each evening: the state of the sea, "
    "the ships that passed, and the colour of the sky an hour before dark. In forty years he "
    "missed a single day, the third of March 1911, and never said why."
)
PROMPTS = {
    "quote": f"Repeat the following text word for word.\n\n{PASSAGE}",
    "edit": "Rewrite the text below. Change nothing but this: in place of 'keeper' write 'warden'."
    f"\n\n{PASSAGE}",
    "free": "Write a short story about a gardener who finds an old map.",
}


class Knowing:
    """Knows the text; each token that it drafts is right with a chance, else another one."""

    def __init__(self, text: list[int], chance: float) -> None:
        self._text, self._chance, self._draw = text, chance, random.Random(0)

    def __call__(self, token_ids: Tensor, num_tokens: int) -> list[int]:
        following = self._text[len(token_ids) : len(token_ids) + num_tokens]
        return [
            token if self._draw.random() < self._chance else (token + 1) % 100
            for token in following
        ]


def prompts_of(model: Any, num_random: int) -> dict[str, Tensor]:
    """Token ids [1, T] by name."""
    if model.tokenizer is None:
        return {"random": random_prompt(num_random)}
    return {
        name: model.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )["input_ids"]
        for name, text in PROMPTS.items()
    }


def pass_costs(model: Any, prompt: Tensor, text: list[int], rounds: int) -> list[dict[str, Any]]:
    """The first table. `text` goes on after `prompt` [1, T], again and again."""
    cache = model.new_cache()
    store, engine = cache.store, model.engine
    sequence = store.new_sequence()
    engine.run(store, [NewTokens(sequence, prompt[0], 0)])
    start, found = prompt.shape[1], {n: [] for n in CHECKED}
    turns = [n for _ in range(rounds) for n in CHECKED]
    needed = [text[i % len(text)] for i in range(sum(turns) + 6)]
    for turn, num_tokens in enumerate([1] * 6 + turns):  # the first ones fill what memory keeps
        ids, needed = torch.tensor(needed[:num_tokens]), needed[num_tokens:]
        before, seconds = model.stats, engine.counters.counted.decode_seconds
        work = NewTokens(sequence, ids, start, num_tokens, num_tokens - 1)
        engine.run(store, [work])
        start, after = start + num_tokens, model.stats
        if turn >= 6:
            found[num_tokens].append(
                {
                    "seconds": engine.counters.counted.decode_seconds - seconds,
                    "bytes_read": after.weight_bytes_read - before.weight_bytes_read,
                    "experts_routed": after.experts_routed - before.experts_routed,
                    "experts_read": after.experts_read - before.experts_read,
                }
            )
    cache.close()
    return [
        {"checked": n, **{key: statistics.median(one[key] for one in runs) for key in runs[0]}}
        for n, runs in found.items()
    ]


def answer(
    model: Any, prompt: Tensor, args: argparse.Namespace
) -> tuple[list[int], dict[str, Any]]:
    """The new tokens, and what they took."""
    before = model.stats
    output = model.generate(
        prompt,
        max_new_tokens=args.new,
        do_sample=False,
        attention_mask=torch.ones_like(prompt),
        **({"eos_token_id": None} if args.ignore_end else {}),
    )
    after = model.stats
    seconds = after.decode_seconds - before.decode_seconds
    names = ("weight_passes", "drafted_tokens", "accepted_tokens", "undrafted_passes")
    return output[0, prompt.shape[1] :].tolist(), {
        "tokens_per_second": (after.decode_tokens - before.decode_tokens) / seconds,
        "new_tokens": output.shape[1] - prompt.shape[1],
        "tokens_per_pass": (output.shape[1] - prompt.shape[1])
        / (after.weight_passes - before.weight_passes),
        **{name: getattr(after, name) - getattr(before, name) for name in names},
    }


def rates(
    model: Any, source: Any, prompt: Tensor, text: list[int], args: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """The second table for one prompt, whose answer is `text`, with drafts of `source`."""
    for chance in args.chance or [None]:
        runs: dict[str, list[dict[str, Any]]] = {"none": [], "gate": [], "ten": []}
        same = True
        for _ in range(args.rounds):
            for mode, found in runs.items():
                drafter = source
                if chance is not None:
                    drafter = Knowing([*prompt[0].tolist(), *text], chance)
                model.draft_with(None if mode == "none" else drafter, 10 if mode == "ten" else None)
                tokens, run = answer(model, prompt, args)
                same, found_same = same and tokens == text, tokens == text
                found.append({**run, "same_text": found_same})
                say(f"  {mode:5} {run}")
        yield {"chance": chance, "same_text": same, "runs": runs}


def say(line: str) -> None:
    """For people."""
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    """Measure, and print the record."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--adapter", help="MODULE:CLASS, for a model without an installed one")
    parser.add_argument("--device-memory", default="100MB")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--reader", default="direct", choices=["auto", "direct", "mmap"])
    parser.add_argument("--new", type=int, default=64, help="new tokens")
    parser.add_argument("--ignore-end", action="store_true", help="go on after the end of a text")
    parser.add_argument("--rounds", type=int, default=2, help="of answers in turns; 0: none")
    parser.add_argument("--turns", type=int, default=5, help="of passes over each number of tokens")
    parser.add_argument("--prompt", type=int, default=16, help="of random tokens")
    parser.add_argument("--chance", type=float, nargs="*", help="of a token to be right")
    parser.add_argument("--prompts", nargs="*", choices=[*PROMPTS, "random"], help="[default: all]")
    parser.add_argument("--draft-model", type=Path, help="drafts, in place of the lookup")
    parser.add_argument("--json", type=Path, help="write the record to this file")
    args = parser.parse_args()
    registry = None
    if args.adapter:
        module, _, name = args.adapter.partition(":")
        registry = Registry.of(getattr(importlib.import_module(module), name)())
    files = checkpoint_files(args.model)
    limits = [probe(files).gb_per_second]
    with ollm.load(
        args.model,
        device="cpu",
        device_memory=args.device_memory,
        dtype=args.dtype,
        reader=args.reader,
        kv="device",
        registry=registry,
        draft="model" if args.draft_model else "lookup",
        draft_model=args.draft_model,
    ) as model:
        found, source = {}, model._drafter
        for name, prompt in prompts_of(model, args.prompt).items():
            if args.prompts and name not in args.prompts:
                continue
            model.draft_with(None)
            text, _ = answer(model, prompt, args)
            say(f"{name}: {model.tokenizer.decode(text) if model.tokenizer else text[:8]!r}")
            costs = pass_costs(model, prompt, text, args.turns)
            for one in costs:
                say(f"  {one}")
            found[name] = {
                "prompt_tokens": prompt.shape[1],
                "passes": costs,
                "answers": list(rates(model, source, prompt, text, args)) if args.rounds else [],
            }
        model.draft_with(source)  # to be closed
        stats = model.stats
    limits.append(probe(files).gb_per_second)
    record = {
        **environment(args.model),
        "weight_bytes": stats.weight_bytes,
        "device_limit_bytes": stats.device_limit_bytes,
        "device_peak_bytes": stats.device_peak_bytes,
        "resident_bytes": stats.resident_bytes,
        "reader": stats.reader,
        "cache": "O_DIRECT, past the page cache" if stats.reader == "direct" else "as it was",
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "disk_limit_gb_s": [round(limit, 3) for limit in limits],
        "draft": args.draft_model.name if args.draft_model else "lookup",
        "prompts": found,
    }
    finish(record, args.json)


if __name__ == "__main__":
    main()
