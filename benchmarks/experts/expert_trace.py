"""Record which experts a model's routers choose: for each weight pass and layer, every expert and
how many tokens went to it.

Each text is one conversation: its first tokens are the prompt, read in one pass, the tokens after
those are fed one a pass, as decoding does. So a trace does not depend on how well the model writes,
and no token is generated. Any model that oLLM opens will do, an installed adapter granted.

    python benchmarks expert_trace models/moefied TRACE.json \
        --adapter benchmarks.experts.moefy:Qwen2Moe
    python benchmarks expert_trace gpt-oss-20b TRACE.json --device-memory 8GB TEXT...
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch

import ollm
from benchmarks import ROOT
from ollm_core.engine.batch import NewTokens
from ollm_core.plugins.registry import Registry

TEXTS = (
    "docs/plugins.md",
    "ollm_core/weights/streamer.py",
    "LICENSE",
    "CHANGELOG.md",
    "tests/kv/disk/test_prefix_cache.py",
    "benchmarks/experts/dialogue.txt",
)


def record(model: Any, texts: list[list[int]], num_prompt: int) -> list[dict[str, Any]]:
    """Passes in order, with what each asked of each layer: {layer: {expert: tokens}}."""
    asked: dict[int, Counter[int]] = {}
    real = model.weights.experts

    def listening(layer_idx: int, expert_ids: Any) -> Any:
        asked[layer_idx] = Counter(expert_ids)
        return real(layer_idx, expert_ids)

    passes = []
    model.weights.experts = listening
    for number, ids in enumerate(texts):
        cache = model.new_cache("host")
        tokens = torch.tensor(ids)
        sequence, store = cache.store.new_sequence(), cache.store
        cuts = [0, *range(num_prompt, len(ids) + 1)]
        for begin, end in itertools.pairwise(cuts):
            asked.clear()
            model.engine.run(store, [NewTokens(sequence, tokens[begin:end], begin)])
            passes.append(
                {
                    "text": number,
                    "tokens": end - begin,
                    "layers": {i: dict(counts) for i, counts in asked.items()},
                }
            )
        cache.close()
    model.weights.experts = real
    return passes


def main() -> None:
    """Write the trace."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("texts", nargs="*", type=Path)
    parser.add_argument("--adapter", help="MODULE:CLASS, for a model without an installed one")
    parser.add_argument("--prompt", type=int, default=300, help="tokens of a text read at once")
    parser.add_argument("--decode", type=int, default=160, help="tokens fed one by one")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--device-memory")
    options = parser.parse_args()
    registry = None
    if options.adapter:
        module, _, name = options.adapter.partition(":")
        registry = Registry.of(getattr(importlib.import_module(module), name)())
    paths = options.texts or [ROOT / name for name in TEXTS]
    with ollm.load(
        options.model,
        device=options.device,
        device_memory=options.device_memory,
        registry=registry,
    ) as model:
        num_tokens = options.prompt + options.decode
        texts = [model.tokenizer(path.read_text()).input_ids[:num_tokens] for path in paths]
        passes = record(model, texts, options.prompt)
        num_experts = {i: len(units) for i, units in model.weights.expert_units.items()}
    trace = {"model": Path(options.model).name, "texts": [p.name for p in paths]}
    options.out.write_text(json.dumps({**trace, "experts": num_experts, "passes": passes}))
    print(f"{len(passes)} passes of {len(texts)} texts, {sum(num_experts.values())} experts")


if __name__ == "__main__":
    main()
