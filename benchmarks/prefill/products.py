"""Products with weights in half precision, by rows: torch's own, and those of this project."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from datetime import date

import torch
from torch.nn import functional

from ollm_core.products.products import CpuProducts
from ollm_core.products.select import choose_products, has_instructions, without_instructions

ROWS = (1, 2, 4, 8, 16, 24, 32, 128, 512)
SHAPES = ((5632, 2048), (14336, 4096), (576, 576))


def least_milliseconds(work: Callable[[], object], repeats: int) -> float:
    """The least of some tries, after one that is not counted."""
    work()
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return min(found) * 1e3


def measure(shape: tuple[int, int], rows: int, repeats: int) -> dict[str, float]:
    """Milliseconds of each way to multiply `rows` states with a matrix [N, K]."""
    matrix = torch.randn(*shape).bfloat16()
    states = torch.randn(rows, shape[1]).bfloat16()
    with without_instructions():
        chosen = choose_products(torch.bfloat16, torch.device("cpu"), "fast")
    assert chosen is not None
    tiles = CpuProducts(torch.bfloat16, None)
    wide, wide_states = matrix.float(), states.float()
    ways = {
        "torch": lambda: functional.linear(states, matrix),
        "chosen": lambda: functional.linear(states, chosen.weight(matrix)),
        "tiles": lambda: functional.linear(states, tiles.weight(matrix)),
        "float32": lambda: functional.linear(wide_states, wide),
    }
    with torch.inference_mode():
        return {name: least_milliseconds(way, repeats) for name, way in ways.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", help="a file for the record in JSON")
    options = parser.parse_args()
    record = {
        "date": str(date.today()),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "instructions": has_instructions(torch.bfloat16),
        "milliseconds": {},
    }
    for shape in SHAPES:
        print(f"W {list(shape)}, milliseconds\n\n| rows | torch | chosen | tiles | float32 W |")
        print("| ---: " * 5 + "|")
        for rows in ROWS:
            found = measure(shape, rows, options.repeats)
            record["milliseconds"][f"{list(shape)} x {rows}"] = found
            print(f"| {rows} | " + " | ".join(f"{each:.2f}" for each in found.values()) + " |")
            sys.stdout.flush()
        print()
    if options.out:
        with open(options.out, "w", encoding="utf-8") as file:
            json.dump(record, file, indent=1)


if __name__ == "__main__":
    main()
