"""What this machine can do by itself: disk, bus, memory, compute. Plans of later parts go by it."""

from __future__ import annotations

import torch

from benchmarks.gpu.parts.work import OutOfTime, Tell, Work
from ollm_core.calibration.rates import measure_rates, measured_readers
from ollm_core.calibration.timing import least_seconds
from ollm_core.device.dtypes import DTYPES

_BUS_BYTES = 256 << 20


def run(work: Work, tell: Tell, _: str = "") -> None:
    """A finding for each dtype's rates, the reading engines and the bus. Raises OutOfTime."""
    dtypes = ("bfloat16", "float32", "float16")
    for dtype in dtypes[:1] if work.small else dtypes:
        if work.seconds_left < 4:
            raise OutOfTime(f"rates in {dtype} were not measured")
        rates = measure_rates(work.directory, torch.device(work.device), DTYPES[dtype])
        if dtype == "bfloat16":
            readers = measured_readers(work.directory)
            told = ", ".join(f"{name} {rate / 1e9:.2f} GB/s" for name, rate in readers.items())
            tell("reading engines", told, per_second=dict(readers))
            bus = bus_rates(work)
            told = ", ".join(f"{name} {rate / 1e9:.2f}" for name, rate in bus.items())
            tell("bus", f"GB/s: {told}", per_second=bus)
        tell(
            dtype,
            f"memory {rates.memory.per_second / 1e9:.0f} GB/s, "
            f"compute {rates.compute.per_second / 1e12:.3g} TFLOP/s",
            memory_per_second=rates.memory.per_second,
            compute_per_second=rates.compute.per_second,
            bus_per_second=rates.bus.per_second if rates.bus else None,
        )


def bus_rates(work: Work) -> dict[str, float]:
    """Bytes per second between host and device, by kind of host memory and direction. On a CPU,
    where there is no bus, of a copy.
    """
    num_bytes = _BUS_BYTES >> 6 if work.small else _BUS_BYTES
    device = torch.device(work.device)
    target = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    found = {}
    for name, pinned in (("pageable", False), ("pinned", True))[: 2 if work.on_card else 1]:
        host = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=pinned)
        for direction, to, source in (("to device", target, host), ("to host", host, target)):

            def copy(to: torch.Tensor = to, source: torch.Tensor = source) -> None:
                to.copy_(source, non_blocking=True)

            found[f"{name} {direction}"] = num_bytes / least_seconds(copy, device)
    return found
