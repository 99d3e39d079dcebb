"""The rates of this machine, of its disk, memory and compute: measured and saved, or assumed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

from ollm_core.attention.trial import blocks_work, flash_works
from ollm_core.calibration.attention import measure_attention, measure_blocks
from ollm_core.calibration.disk import measure_readers
from ollm_core.calibration.fresh_memory import measure_fresh_memory
from ollm_core.calibration.layer import measure_layer
from ollm_core.calibration.products import ROWS, measure_products
from ollm_core.calibration.timing import least_seconds
from ollm_core.device.memory import memory_of
from ollm_core.errors import InputError
from ollm_core.files.paths import cache_directory
from ollm_core.files.scratch import replace_file
from ollm_core.files.untrusted_json import parse_object
from ollm_core.products.select import choose_products
from ollm_core.weights.sources.posix import READERS

_CLEARLY = 1.1
PRECISIONS = ("fast", "exact")
HEAD_SIZES = (64, 128)
_PROMPT_ROWS = ROWS[-1]

_ASSUMED = {  # on the low side of what such machines have
    "disk": 2.0e9,
    "cpu memory": 10e9,
    "cuda memory": 250e9,
    "cuda bus": 12e9,
    "fresh": 2e9,
    "cpu compute float32": 50e9,
    "cpu compute float16": 20e9,
    "cpu compute bfloat16": 20e9,
    "cuda compute float32": 8e12,
    "cuda compute float16": 20e12,
    "cuda compute bfloat16": 20e12,
    "cpu layer": 2500,
    "cuda layer": 2500,
    "cpu states": 0.5e9,
    "cuda states": 20e9,
}


@dataclass(frozen=True, slots=True)
class Rate:
    """Bytes or multiply-adds counted twice (FLOP), per second."""

    per_second: float
    source: str
    """"assumed", or "measured" and when."""


@dataclass(frozen=True, slots=True)
class Rates:
    """What a plan's times are made from."""

    disk: Rate
    """Bytes read from where models lie."""
    memory: Rate
    """Bytes of weights that the device goes through for one token."""
    compute: Rate
    """FLOP of a prompt's matrix products in the compute dtype."""
    layer: Rate
    """Calls of a layer, were it next to nothing: what a layer costs by itself."""
    states: Rate
    """Numbers that a layer makes: what norms, gates and the like cost for each."""
    products: Mapping[int, float]
    """FLOP of matrix products per second, by the rows of states. From `memory` and `compute` where
    it was not measured.
    """
    blocks: Mapping[int, Mapping[int, float]]
    """FLOP of attention in blocks per second, by the size of a head and by new tokens; empty where
    it was not measured: as products.
    """
    fresh: Rate
    """Bytes of host memory that were not used before: the system finds their pages and clears them
    when a weight is loaded to stay.
    """
    bus: Rate | None = None
    """Bytes from host memory to the device; None where they are one."""


def rates_file() -> Path:
    """Where measured rates are kept."""
    return cache_directory() / "rates.json"


def find_rates(
    directory: Path, device: torch.device, dtype: torch.dtype, precision: str = "fast"
) -> Rates:
    """What `measure_rates` has kept for the disk of `directory` and for `device`, in a run with
    `precision`; what it has not is assumed.
    """
    kept = _read()
    disk = kept.get(_disk_key(directory), {})
    here = kept.get(_device_key(device), {})
    name = str(dtype).removeprefix("torch.")

    def rate(found: Mapping[str, Any], key: str, assumed: str) -> Rate:
        value, when = found.get(key), found.get("date")
        if isinstance(value, (int, float)) and value > 0:
            return Rate(float(value), f"measured {when}")
        return Rate(_ASSUMED[assumed], "assumed")

    kind = "cpu" if device.type == "cpu" else "cuda"
    memory = rate(here, f"memory {name}", f"{kind} memory")
    compute = rate(here, f"compute {name} {precision}", f"{kind} compute {name}")
    measured = _by_rows(here.get(f"products {name} {precision}"))
    return Rates(
        disk=rate(disk, "disk", "disk"),
        memory=memory,
        compute=compute,
        layer=rate(here, f"layer {name}", f"{kind} layer"),
        states=rate(here, f"states {name}", f"{kind} states"),
        products=measured or products_of(memory, compute, dtype),
        blocks={
            size: rates
            for size in HEAD_SIZES
            if (rates := _by_rows(here.get(f"blocks {name} {size}")))
        },
        fresh=rate(here, "fresh", "fresh"),
        bus=None if kind == "cpu" else rate(here, "bus", "cuda bus"),
    )


def products_of(memory: Rate, compute: Rate, dtype: torch.dtype) -> Mapping[int, float]:
    """FLOP per second by rows, of products that are bound by one of these."""
    one_row = 2 * memory.per_second / dtype.itemsize
    return {rows: min(compute.per_second, rows * one_row) for rows in ROWS}


def measure_rates(directory: Path, device: torch.device, dtype: torch.dtype) -> Rates:
    """Measure, which takes some seconds, and keep what was found. `device` must be here.

    Reads the largest model file in `directory`, or one that is made there for it and removed.
    Raises InputError if there is none and none can be made, or the rates cannot be kept.
    """
    kept = _read()
    today = date.today().isoformat()
    readers = measure_readers(_existing(directory))
    kept[_disk_key(directory)] = {"disk": max(readers.values()), "readers": readers, "date": today}
    name = str(dtype).removeprefix("torch.")
    here = kept.setdefault(_device_key(device), {})
    exact = fast = measure_products(device, dtype, "exact")
    if choose_products(dtype, device, "fast"):
        fast = measure_products(device, dtype, "fast")
    for precision, found in zip(PRECISIONS, (fast, exact), strict=True):
        here[f"products {name} {precision}"] = {str(rows): rate for rows, rate in found.items()}
        here[f"compute {name} {precision}"] = found[_PROMPT_ROWS]
    here[f"memory {name}"] = exact[1] * dtype.itemsize / 2
    here[f"layer {name}"], here[f"states {name}"] = measure_layer(device, dtype)
    for size in HEAD_SIZES:
        blocks = measure_blocks(device, dtype, size)
        here[f"blocks {name} {size}"] = {str(rows): rate for rows, rate in blocks.items()}
    here["fresh"] = measure_fresh_memory()
    if device.type != "cpu":
        here["bus"] = _bus_rate(device)
        here[f"attention {name}"] = measure_attention(device, dtype)
    here["date"] = today
    path = rates_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, (json.dumps(kept, indent=1) + "\n").encode())
    except OSError as error:
        raise InputError(f"cannot save the rates in {path}: {error.strerror}") from error
    return find_rates(directory, device, dtype)


def measured_readers(directory: Path) -> Mapping[str, float]:
    """Bytes per second of the reading engines on the disk of `directory`, by name, as
    `measure_rates` has kept them; empty if it has not.
    """
    return _by_name(_read().get(_disk_key(directory), {}).get("readers"))


def fastest_reader(directory: Path) -> str:
    """The reading engine to use there: one that was measured to be faster by a tenth than what
    "auto" would take, else "auto".
    """
    rates = measured_readers(directory)
    default = rates.get("direct") or rates.get("mmap", 0)
    best = max(rates, key=lambda name: rates[name], default="auto")
    return best if best in READERS and rates[best] > _CLEARLY * default > 0 else "auto"


def measured_attention(device: torch.device, dtype: torch.dtype) -> Mapping[str, float]:
    """FLOP per second of the kernels of block-wise attention, by the attention that uses them, as
    `measure_rates` has kept them; empty if it has not.
    """
    name = str(dtype).removeprefix("torch.")
    return _by_name(_read().get(_device_key(device), {}).get(f"attention {name}"))


def fastest_blocks(device: torch.device, dtype: torch.dtype) -> str:
    """What "auto" takes where attention is not exact: "flash" where it was measured to be faster by
    a tenth and still works, else "blockwise", or "products" where torch's kernels do not work.
    """
    rates = measured_attention(device, dtype)
    faster = rates.get("flash", 0) > _CLEARLY * rates.get("blockwise", 0)
    if faster and flash_works(device, dtype):
        return "flash"
    return "blockwise" if blocks_work(device, dtype) else "products"


def as_fields(rates: Rates) -> dict[str, Any]:
    """For JSON."""
    return asdict(rates)


def _by_name(found: object) -> Mapping[str, float]:
    if not isinstance(found, dict):
        return {}
    return {name: float(rate) for name, rate in found.items() if isinstance(rate, (int, float))}


def _by_rows(found: object) -> Mapping[int, float]:
    """Rates by rows as JSON has them; empty if they are not that."""
    rates = {name: rate for name, rate in _by_name(found).items() if name.isdecimal() and rate > 0}
    return {int(name): rate for name, rate in rates.items()}


def _read() -> dict[str, dict[str, Any]]:
    """What was kept; nothing if that cannot be read."""
    try:
        kept = parse_object(rates_file().read_bytes())
    except (OSError, ValueError):
        return {}
    return {key: value for key, value in kept.items() if isinstance(value, dict)}


def _existing(directory: Path) -> Path:
    """`directory`, or the next one above it that is there."""
    directory = directory.absolute()
    return next(path for path in (directory, *directory.parents) if path.is_dir())


def _disk_key(directory: Path) -> str:
    number = _existing(directory).stat().st_dev
    return f"disk {os.major(number)}:{os.minor(number)}"


def _device_key(device: torch.device) -> str:
    if device.type == "cuda" and torch.cuda.is_available():
        return f"device {torch.cuda.get_device_name(device)}"
    return f"device {device.type}"


def _bus_rate(device: torch.device) -> float:
    host = memory_of(device).host_buffer(256 << 20).zero_()
    target = torch.empty_like(host, device=device)
    return host.nbytes / least_seconds(lambda: target.copy_(host, non_blocking=True), device)
