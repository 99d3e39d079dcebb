"""Memory of a run as the device's allocator, the process, the accounts and the plan have it."""

from __future__ import annotations

import gc
from types import TracebackType
from typing import Any, Self

from benchmarks.tools.measure import PeakAnonymousMemory
from ollm_conformance.card import CardPeak
from ollm_core.generate.causal_lm import StreamedModel
from ollm_core.planning.plan import Plan


class Peaks:
    """Context manager: the peaks of what is done inside; on a CPU those of the process alone."""

    def __init__(self, device: str) -> None:
        self._anonymous = PeakAnonymousMemory()
        self.card = CardPeak(device) if device != "cpu" else None

    def __enter__(self) -> Self:
        gc.collect()
        if self.card:
            self.card.__enter__()
        self._anonymous.__enter__()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._anonymous.__exit__(exc_type, exc, traceback)
        if self.card and exc is None:
            self.card.__exit__(exc_type, exc, traceback)

    def beside(self, model: StreamedModel, plan: Plan | None) -> dict[str, Any]:
        """These, what the accounts of `model` say, and what `plan` said, for the record."""
        stats, card = model.stats, self.card
        found: dict[str, Any] = {
            "device_limit_bytes": stats.device_limit_bytes,
            "device_accounted_bytes": stats.device_peak_bytes,
            "device_requested_bytes": card and card.requested_bytes,
            "device_allocated_bytes": card and card.allocated_bytes,
            "device_reserved_bytes": card and card.reserved_bytes,
            "workspace_bytes": card and card.workspace_bytes,
            "host_limit_bytes": stats.host_limit_bytes,
            "host_accounted_bytes": stats.host_peak_bytes,
            "host_process_bytes": stats.process_peak_bytes,
            "host_anonymous_bytes": self._anonymous.num_bytes,
        }
        if plan is not None:
            found["device_planned_bytes"] = plan.device_peak_bytes
            found["host_planned_bytes"] = plan.host_peak_bytes
            if card:
                found["planned_to_requested"] = ratio(plan.device_peak_bytes, card.requested_bytes)
                found["reserved_to_planned"] = ratio(card.reserved_bytes, plan.device_peak_bytes)
        return found


def over_budget(found: dict[str, Any], beside_bytes: int = 0) -> str:
    """The fault of a run, if it has one: more than was allowed, `beside_bytes` apart, which are on
    the device and not the library's. Of the host only what the accounts say is held against it; a
    process has more than they count.
    """
    for memory, what, beside in (
        ("device", "accounted", 0),
        ("device", "requested", beside_bytes),
        ("host", "accounted", 0),
    ):
        taken, limit = found[f"{memory}_{what}_bytes"], found[f"{memory}_limit_bytes"]
        if taken is not None and taken > limit + beside:
            return f"{taken - limit - beside} bytes over the {memory} budget of {limit} ({what})"
    return ""


def as_planned(found: dict[str, Any]) -> str:
    """How a plan's device peak compares with the allocator's, for people."""
    planned, requested = found.get("device_planned_bytes"), found["device_requested_bytes"]
    taken = found["device_accounted_bytes"] if requested is None else requested
    kind = "accounted" if requested is None else "requested"
    told = f"{taken / 1e6:.1f} MB {kind} of {found['device_limit_bytes'] / 1e6:.1f}"
    if found["device_reserved_bytes"] is not None:
        told += f", {found['device_reserved_bytes'] / 1e6:.1f} reserved"
    return told if planned is None else f"{told}, {planned / 1e6:.1f} planned"


def ratio(one: float | None, other: float) -> float | None:
    """Rounded, for the record."""
    return round(one / other, 4) if one is not None and other else None
