"""Does torch.compile make a layer's decode step faster, and is it still exact?

usage: compiled.py [--device cpu] [--rounds 5] [--json FILE]

One new token through one Llama layer after 512 cached ones, in the shapes of SmolLM2-135M and of
Llama 3.1 8B: transformers' own layer, the same compiled, and on CUDA the same in CUDA graphs
("reduce-overhead"). In turns; the time of a step is the best of all rounds. A compiler for C++ must
be there.

The last line on stdout is the record as JSON; the report for people goes to stderr.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from benchmarks.tools.measure import environment, finish

PAST = 512
SHAPES: Mapping[str, Mapping[str, int]] = {
    "SmolLM2-135M": {"hidden": 576, "intermediate": 1536, "heads": 9, "kv_heads": 3},
    "Llama-3.1-8B": {"hidden": 4096, "intermediate": 14336, "heads": 32, "kv_heads": 8},
}
_STEPS = 20

Step = Callable[[Tensor], Tensor]


class _Past:
    """Stands for a cache: new keys and values go behind the same past ones at each call."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self._keys, self._values = keys, values

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *_: object
    ) -> tuple[Tensor, Tensor]:
        return torch.cat([self._keys, keys], 2), torch.cat([self._values, values], 2)


def layer_step(shape: Mapping[str, int], dtype: torch.dtype, device: str) -> tuple[Step, Tensor]:
    """One layer with random weights as a function of its input [1, 1, C], and an input."""
    config = LlamaConfig(
        hidden_size=shape["hidden"],
        intermediate_size=shape["intermediate"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        num_hidden_layers=1,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    with torch.device(device):
        layer: Any = LlamaDecoderLayer(config, 0).to(dtype).eval()
        hidden = torch.randn(1, 1, shape["hidden"], dtype=dtype)
        past = torch.randn(2, 1, shape["kv_heads"], PAST, config.head_dim, dtype=dtype)
        positions = torch.tensor([[PAST]])
        embeddings = LlamaRotaryEmbedding(config)(hidden, positions)
    cache = _Past(past[0], past[1])

    def step(hidden: Tensor) -> Tensor:
        found: Tensor = layer(
            hidden,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            position_embeddings=embeddings,
        )
        return found

    return step, hidden


def compare(
    shape: Mapping[str, int], dtype: torch.dtype, device: str, rounds: int
) -> dict[str, Any]:
    """Seconds of a step each way, of compiling, and whether the bits are those of the layer."""
    step, hidden = layer_step(shape, dtype, device)
    ways: dict[str, Step] = {"eager": step, "compiled": torch.compile(step)}
    if device != "cpu":
        ways["graphs"] = torch.compile(step, mode="reduce-overhead")
    with torch.inference_mode():
        expected = step(hidden).clone()
        compiling, same = {}, {}
        for name, way in ways.items():
            started = time.perf_counter()
            for _ in range(3):  # CUDA graphs are recorded at the second call
                found = way(hidden).clone()
            _wait(device)
            compiling[name] = time.perf_counter() - started
            same[name] = torch.equal(found, expected)
        seconds = {name: _best(way, hidden, device, rounds) for name, way in ways.items()}
    return {
        "seconds": {name: round(value, 7) for name, value in seconds.items()},
        "times_as_fast": {n: round(seconds["eager"] / s, 3) for n, s in seconds.items()},
        "same_bits": same,
        "first_calls_seconds": {name: round(value, 1) for name, value in compiling.items()},
    }


def _best(way: Step, hidden: Tensor, device: str, rounds: int) -> float:
    found = []
    for _ in range(rounds):
        started = time.perf_counter()
        for _ in range(_STEPS):
            way(hidden)
        _wait(device)
        found.append((time.perf_counter() - started) / _STEPS)
    return min(found)


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)


def told(found: Mapping[str, Any]) -> str:
    """A comparison in one line."""
    return ", ".join(
        f"{name} {1e6 * found['seconds'][name]:.0f} us ({times:.2f} times as fast, "
        f"{'the same bits' if found['same_bits'][name] else 'other bits'})"
        for name, times in found["times_as_fast"].items()
    )


def compared(names: Sequence[str], device: str, rounds: int) -> list[dict[str, Any]]:
    """Each shape in bfloat16 and float32, told as it ends."""
    runs = []
    for name in names:
        for dtype in (torch.bfloat16, torch.float32):
            torch.compiler.reset()
            found = compare(SHAPES[name], dtype, device, rounds)
            runs.append({"shape": name, "dtype": str(dtype).removeprefix("torch."), **found})
            print(f"{name}, {runs[-1]['dtype']}: {told(found)}", file=sys.stderr, flush=True)
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description="A layer's decode step, eager and compiled.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the record to this file")
    args = parser.parse_args()
    record = {
        **environment(Path()),
        "threads": torch.get_num_threads(),
        "past_tokens": PAST,
        "runs": compared(list(SHAPES), args.device, args.rounds),
    }
    finish(record, args.json)


if __name__ == "__main__":
    main()
