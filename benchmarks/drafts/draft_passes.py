"""Tokens per weight pass on tasks that quote, by draft source: counts, which no busy machine moves.

usage: draft_passes.py [MODEL] [--json FILE]

MODEL, a Llama, repeats and edits a passage of a document: without drafts, with lookups (by the
gate, and ten tokens always), and with draft models made of itself, ten tokens always: the same
weights, an upper bound; copies with noise added to every matrix, a share of its own spread; and
copies without some of the middle layers. A copy is as slow as the model, or nearly, so seconds tell
nothing here, and none are recorded.

Of gpt-oss and Qwen3-Next no real weights can be had: tiny models are trained to quote (copying.py),
and asked to go on with a text of which they see the first three tokens again.

float32, in which the text must be the same with every source. The last line on stdout is the result
as JSON.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import ollm
from benchmarks.drafts import copying
from benchmarks.drafts.drafts import PASSAGE
from benchmarks.tools.measure import environment, finish

DOCUMENT = f"""The island has no harbour. Boats are drawn up on the shingle below the church, and in
winter the mail comes by the week, when it comes.

{PASSAGE}

His daughter kept the books after him. She wrote less of the sky, and more of the price of oil."""
TASKS = {
    "quote": f"{DOCUMENT}\n\nRepeat the second paragraph of this text word for word.",
    "edit": f"Rewrite the text below. Change nothing but this: in place of 'keeper' write 'warden'."
    f"\n\n{PASSAGE}",
}
NOISE = (0.02, 0.05, 0.1)
DROPPED = (1, 3, 6)


def copies(model: Path, into: Path) -> Iterator[tuple[str, Path]]:
    """Draft models made of `model`, by name: the same, noisy ones, and ones of fewer layers."""
    yield "model, the same weights", model

    def kept(loaded: Any, name: str) -> Path:
        loaded.save_pretrained(into / name)
        AutoTokenizer.from_pretrained(model, trust_remote_code=False).save_pretrained(into / name)
        return into / name

    for share in NOISE:
        loaded = AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.float32, trust_remote_code=False
        )
        torch.manual_seed(0)
        with torch.no_grad():
            for weight in loaded.parameters():
                if weight.dim() > 1:
                    weight += share * weight.std() * torch.randn_like(weight)
        yield f"model, noise of {share}", kept(loaded, f"noise-{share}")
    for number in DROPPED:
        loaded = AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.float32, trust_remote_code=False
        )
        layers = loaded.model.layers
        middle = len(layers) // 2
        gone = {middle + 2 * (i - number // 2) for i in range(number)}
        loaded.model.layers = torch.nn.ModuleList(
            layer for i, layer in enumerate(layers) if i not in gone
        )
        loaded.config.num_hidden_layers = len(loaded.model.layers)
        yield f"model, {number} layers fewer", kept(loaded, f"without-{number}")


def counted(model: Any, prompt: Tensor, num_new: int, end: dict[str, Any]) -> dict[str, Any]:
    """The tokens of one answer, and what they took."""
    before = model.stats
    output = model.generate(
        prompt,
        max_new_tokens=num_new,
        do_sample=False,
        attention_mask=torch.ones_like(prompt),
        **end,
    )
    after, names = model.stats, ("weight_passes", "drafted_tokens", "accepted_tokens")
    return {
        "tokens": output[0, prompt.shape[1] :].tolist(),
        **{name: getattr(after, name) - getattr(before, name) for name in names},
    }


def sources(drafts: dict[str, Path], *, gate: bool = True) -> Iterator[tuple[str, dict[str, Any]]]:
    """What to give `load`, by name; first of all nothing."""
    yield "none", {}
    if gate:
        yield "lookup, gate", {"draft": "lookup"}
    yield "lookup, ten", {"draft": "lookup", "num_draft_tokens": 10}
    for name, directory in drafts.items():
        yield name, {"draft": "model", "draft_model": directory, "num_draft_tokens": 10}


def table(
    directory: Path,
    drafts: dict[str, Path],
    prompts: dict[str, list[Tensor]],
    num_new: int,
    end: dict[str, Any],
) -> dict[str, Any]:
    """Counts by task and draft source, summed over the prompts [1, T] of a task."""
    found: dict[str, Any] = {task: {} for task in prompts}
    texts: dict[str, list[list[int]]] = {}
    for name, options in sources(drafts):
        with ollm.load(directory, device="cpu", dtype="float32", kv="device", **options) as model:
            for task, asked in prompts.items():
                runs = [counted(model, prompt, num_new, end) for prompt in asked]
                tokens = [run.pop("tokens") for run in runs]
                texts.setdefault(task, tokens)
                total = {key: sum(run[key] for run in runs) for key in runs[0]}
                num_tokens = sum(map(len, tokens))
                found[task][name] = {
                    "new_tokens": num_tokens,
                    **total,
                    "tokens_per_pass": round(num_tokens / total["weight_passes"], 2),
                    "same_text": tokens == texts[task],
                }
                print(f"{directory.name} {task}: {name}: {found[task][name]}", file=sys.stderr)
    return found


def llama(directory: Path, into: Path, num_new: int) -> dict[str, Any]:
    """A real model and its copies."""
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    prompts = {
        name: [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": text}],
                add_generation_prompt=True,
                return_tensors="pt",
                return_dict=True,
            )["input_ids"]
        ]
        for name, text in TASKS.items()
    }
    return table(directory, dict(copies(directory, into)), prompts, num_new, {})


def trained(family: str, into: Path, seconds: float) -> dict[str, Any]:
    """A tiny model that was taught to quote, on texts that it has not seen."""
    directory = into / family
    training = copying.train(family, directory, steps=5000, seconds=seconds)
    draw = torch.Generator().manual_seed(1)
    ids, _ = copying.texts(8, copying.NUM_TOKENS, draw)
    half = copying.NUM_TOKENS // 2
    prompts = [torch.cat([text[:half], text[:3]])[None] for text in ids]
    drafts = {"model, the same weights": directory}
    counts = table(directory, drafts, {"quote": prompts}, half - 3, {"eos_token_id": None})
    with ollm.load(directory, device="cpu") as model:
        right = sum(
            int((model.generate(prompt, max_new_tokens=half - 3, do_sample=False, eos_token_id=None)
                 [0, half + 3 :] == prompt[0, 3:half]).sum())
            for prompt in prompts
        )  # fmt: skip
    return {"training": training, "quoted_right": f"{right} of {8 * (half - 3)}", **counts}


def main() -> None:
    """Count, and print the record."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--new", type=int, default=80, help="new tokens of the Llama at most")
    parser.add_argument("--training-seconds", type=float, default=300, help="of each tiny model")
    parser.add_argument("--families", nargs="*", default=list(copying.FAMILIES))
    parser.add_argument("--json", type=Path, help="write the record to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        into = Path(place)
        record: dict[str, Any] = environment(args.model or into)
        if args.model is not None:
            record["llama"] = llama(args.model, into, args.new)
        for family in args.families:
            record[family] = trained(family, into, args.training_seconds)
    record["load_average"] = round(os.getloadavg()[0], 2)
    record["note"] = "a busy machine: counts do not depend on it, but for those of the gate"
    finish(record, args.json)


if __name__ == "__main__":
    main()
