"""How long a model with very many tensors takes to open, and to be planned.

usage: load.py [--layers 60] [--experts 128] [--plan ID] [--rounds 3] [--json FILE]

Writes a Qwen3-MoE of tiny width whose checkpoint holds each expert by itself (23,583 tensors by
default), and opens it in processes of their own, in turns: by the adapter of its family, and by the
one for any architecture. The page cache is warm. Then a model of the catalog is planned, by
default one of 74,000 tensors, from its config alone. Each process tells the time of its imports,
and of the call by the clock and in seconds of its processor, which other programs disturb less.

The last line on stdout is the record as JSON; the report for people goes to stderr.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.tools.children import result_of, script

ADAPTERS = {"family": "", "any": "ollm-adapter-transformers"}
"""The plugins that are loaded; empty: all."""
SECONDS = 300


def write_model(directory: Path, layers: int, experts: int) -> int:
    """A model of random weights; the number of its tensors."""
    from safetensors import safe_open
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=256, hidden_size=16, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, intermediate_size=16, moe_intermediate_size=8,
        num_experts=experts, num_experts_per_tok=4, max_position_embeddings=4096,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).bfloat16().save_pretrained(directory)
    with safe_open(directory / "model.safetensors", "pt") as file:
        return len(file.keys())


def child(what: str, path: str) -> dict[str, Any]:
    """Imports, and one call, timed in this process."""
    started = time.perf_counter()
    import torch

    import ollm
    from ollm_core import loader  # noqa: F401 # what opening a model imports
    from ollm_core.products.select import choose_products

    torch.set_num_threads(1)
    choose_products(torch.bfloat16, torch.device("cpu"), "fast")  # compiles, once in a process
    imported = time.perf_counter()
    calls: dict[str, Callable[[], Any]] = {
        "load": lambda: ollm.load(path, device="cpu"),
        "plan": lambda: ollm.plan(path, device="cpu", device_memory="8GB", host_memory="16GB"),
    }
    cpu, begun = time.process_time(), time.perf_counter()
    made = calls[what]()
    found = {
        "import_seconds": round(imported - started, 3),
        "seconds": round(time.perf_counter() - begun, 3),
        "cpu_seconds": round(time.process_time() - cpu, 3),
    }
    if what == "load":
        made.close()
    return found


def measured(directory: Path, plan: str, rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Every run, told as it ends."""
    cases = {f"load, {name}": ("load", str(directory), use) for name, use in ADAPTERS.items()}
    cases["plan"] = "plan", plan, ""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, (what, path, use) in cases.items():
            environ = {
                key: value for key, value in os.environ.items() if key != "OLLM_LOAD_PLUGINS"
            }
            if use:
                environ["OLLM_LOAD_PLUGINS"] = use
            command = [*script("load/load"), "--child", what, path]
            run = result_of(command, seconds=SECONDS, environ=environ)
            found[name].append(run)
            print(f"{name}: {run}", file=sys.stderr, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="How long models take to open.")
    parser.add_argument("--layers", type=int, default=60)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--plan", default="Qwen/Qwen3-Next-80B-A3B-Instruct", metavar="ID")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        import json

        print(json.dumps(child(*args.child)))
        return
    from benchmarks.tools.measure import environment, finish

    with tempfile.TemporaryDirectory(prefix="ollm-load-") as made:
        num_tensors = write_model(Path(made), args.layers, args.experts)
        runs = measured(Path(made), args.plan, args.rounds)
        record = environment(Path(made))
    record |= {
        "layers": args.layers, "experts": args.experts, "num_tensors": num_tensors,
        "plan": args.plan, "runs": runs,
    }  # fmt: skip
    for name, same in runs.items():
        seconds = [run["seconds"] for run in same]
        print(
            f"{name:14} {median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f}), "
            f"imports {median(run['import_seconds'] for run in same):.2f} s",
            file=sys.stderr,
        )
    finish(record, args.json)


if __name__ == "__main__":
    main()
