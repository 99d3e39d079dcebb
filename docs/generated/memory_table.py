"""Writes docs/generated/memory.md: what large models take, planned, beside what others publish.

python docs/generated/memory_table.py > docs/generated/memory.md
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby

import torch

from ollm_core.calibration.rates import Rate, Rates, products_of
from ollm_core.memory.sizes import format_size
from ollm_core.options import PlanOptions
from ollm_core.planning.plan import Plan
from ollm_core.planning.planner import Planner

ROOMY_DEVICE, ROOMY_HOST = 8 * 10**9, 32 * 10**9
DISK, BUS, MEMORY, COMPUTE = 2e9, 12e9, 250e9, 20e12
LAYER, STATES = 2500, 20e9  # calls, and numbers, per second
NEW_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Row:
    """One model at one length."""

    model: str
    context: str
    by: str = ""
    """Which other program publishes figures for it."""
    device: float = 0
    """Those, in GB."""
    disk: float = 0
    """Of weights and KV; 0 if it says nothing."""


ROWS = (
    Row("llama3-1B-chat", "100k", "oLLM", 5, 15),
    Row("llama3-3B-chat", "100k", "oLLM", 5.3, 42),
    Row("llama3-8B-chat", "100k", "oLLM", 6.6, 69),
    Row("gpt-oss-20B", "10k", "oLLM", 7.3, 15),
    Row("gpt-oss-20B", "100k"),
    Row("qwen3-next-80B", "10k"),
    Row("qwen3-next-80B", "50k", "oLLM", 7.5, 180),
    Row("qwen3-next-80B", "100k"),
    Row("llama2-70B-chat", "4k", "AirLLM", 4),
    Row("llama3-405B-chat", "4k", "AirLLM", 8),
)

_HEAD = f"""# What large models take

Planned by `ollm plan` for a GPU, from each model's config alone, and written by
`memory_table.py` here (`make memory`); a test compares. The bytes are those that a run's accounts
would tell: a run holds no more, or is refused. They are **not measured on a GPU**: nothing here has
run on one. The driver's own memory (some hundred MB) and what torch's allocator rounds up come on
top; published figures may contain both.

## The smallest memory

The context counts the prompt and {NEW_TOKENS} new tokens of one sequence. "Device" is the smallest
`--device-memory` with which the run is taken on, "host" the smallest `--host-memory` with that; KV
lies on disk. "Published" is what another program states for the same model and length: the READMEs
of [oLLM](https://github.com/Mega4alik/ollm) 1.0.3 (device and disk, on a card with 8 GB) and of
[AirLLM](https://github.com/lyogavin/airllm) 3.0 (device, no length stated; also 1 to 2 GB for
models of some 8B parameters).

| model | context | weights | KV | device | published | host | disk, all | published |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""

_TIMES = f"""
## What it costs in time

The same runs in that smallest memory, and with {format_size(ROOMY_DEVICE)} of device memory
beside {format_size(ROOMY_HOST)} on the host. These are estimates at rates that are fixed here, on
the low side of what a PC with a GPU has: disk {format_size(DISK)}/s, bus {format_size(BUS)}/s,
device memory {format_size(MEMORY)}/s, compute {COMPUTE / 1e12:.0f} TFLOP/s, {LAYER} calls of a
layer a second (`ollm plan` goes by what `ollm doctor` has measured). Tokens per second are those at
the end of the context, without drafts. oLLM states 0.5 tokens/s for qwen3-next-80B in 7.5 GB.

| model | context | prompt | tokens/s | prompt, {format_size(ROOMY_DEVICE)} | tokens/s | limits |
| --- | --- | --- | --- | --- | --- | --- |
"""


def planned() -> Iterator[tuple[Row, Plan, Plan]]:
    """Each row with the plan in the smallest memory and that in the roomy one."""
    disk, memory, compute, bus, layer, states = (
        Rate(each, "stated") for each in (DISK, MEMORY, COMPUTE, BUS, LAYER, STATES)
    )
    products = products_of(memory, compute, torch.bfloat16)
    rates = Rates(disk, memory, compute, layer, states, products, {}, fresh=memory, bus=bus)
    for model, rows in groupby(ROWS, lambda row: row.model):
        planner = Planner(model, PlanOptions(device="cuda", rates=rates))
        for row in rows:
            options = replace(
                planner.options,
                device_memory=ROOMY_DEVICE,
                host_memory=ROOMY_HOST,
                context=row.context,
                max_new_tokens=NEW_TOKENS,
            )
            roomy = planner.plan(options, compare=False)
            least = replace(
                options,
                device_memory=roomy.smallest_device_bytes,
                host_memory=roomy.smallest_host_bytes,
                kv="disk",
            )
            smallest = planner.plan(least, compare=False)
            assert smallest.fits, smallest.reason
            assert roomy.fits, roomy.reason
            yield row, smallest, roomy


def memory_table(plans: Iterable[tuple[Row, Plan, Plan]]) -> str:
    """The page."""
    sizes, times = [], []
    for row, smallest, roomy in plans:
        sizes.append(
            (
                row.model,
                row.context,
                format_size(smallest.weight_bytes),
                format_size(smallest.kv_bytes),
                format_size(smallest.device_peak_bytes),
                f"{row.device:g} GB ({row.by})" if row.device else "-",
                format_size(smallest.host_peak_bytes),
                format_size(smallest.weight_bytes + smallest.disk_bytes),
                f"{row.disk:g} GB" if row.disk else "-",
            )
        )
        times.append(
            (
                row.model,
                row.context,
                _time(smallest.prefill_seconds),
                f"{smallest.tokens_per_second:.2g}",
                _time(roomy.prefill_seconds),
                f"{roomy.tokens_per_second:.2g}",
                f"{roomy.prefill_limited_by}, {roomy.limited_by}",
            )
        )
    return _HEAD + _lines(sizes) + _TIMES + _lines(times)


def _lines(rows: list[tuple[str, ...]]) -> str:
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


def _time(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 99 else f"{seconds / 60:.2g} min"


if __name__ == "__main__":
    print(memory_table(planned()), end="")  # noqa: T201
