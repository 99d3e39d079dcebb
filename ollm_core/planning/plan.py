"""Plan: the result of planning, as data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ollm_core.calibration.rates import Rates
from ollm_core.planning.dry_run import Moment


@dataclass(frozen=True, slots=True)
class Change:
    """Another way to run it, planned too."""

    option: str
    """As it is written for `ollm plan` and `ollm run`."""
    fits: bool
    prefill_seconds: float
    tokens_per_second: float
    device_peak_bytes: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run would take. If it does not fit, all that is told is of the smallest budgets that
    would do.
    """

    model: str
    adapter: str
    device: str
    dtype: str
    device_memory: int
    host_memory: int
    context: int
    """Tokens of each sequence at the end."""
    max_new_tokens: int
    batch: int
    from_files: bool
    """Whether the model's own files were looked at; otherwise they are as the adapter says."""
    fits: bool
    reason: str
    """Why not."""
    hint: str
    device_peak_bytes: int
    host_peak_bytes: int
    disk_bytes: int
    """KV on disk."""
    weight_bytes: int
    kv_bytes: int
    bytes_read_per_token: int
    """From disk in a decode step at the end, for the new token of each sequence: its part of the
    weights, which all sequences share, and its KV that lies there.
    """
    prefill_seconds: float
    prefill_limited_by: str
    tokens_per_second: float
    """At the end, over all sequences."""
    limited_by: str
    """What decides the time of a decode step: disk, bus, memory or compute."""
    placement: Mapping[str, Any]
    device_bytes: Mapping[str, int]
    """What `device_peak_bytes` is made of."""
    host_bytes: Mapping[str, int]
    smallest_device_bytes: int
    """The least `device_memory` that would do, with enough host memory."""
    smallest_host_bytes: int
    """The least `host_memory` that would do with that."""
    largest_context: int
    """That would do in these budgets; 0 if none would, or none was looked for. Where the family
    takes prompts whole, none beyond `context` and 2,048 is looked for."""
    changes: Sequence[Change]
    """That would help most."""
    rates: Rates
    moments: Sequence[Moment]
    """What is held over the run."""
    planned_from: str = ""
    """What the plan goes by, in words."""

    def fields(self) -> dict[str, Any]:
        """For JSON."""
        found = asdict(self)
        found["moments"] = [
            {
                "name": moment.name,
                "device_bytes": moment.device_bytes,
                "host_bytes": moment.host_bytes,
                "disk_bytes": moment.disk_bytes,
            }
            for moment in _few(self.moments)
        ]
        return found


def _few(moments: Sequence[Moment], number: int = 32) -> Sequence[Moment]:
    """At most about `number` of them, the first and the last included."""
    step = -(-len(moments) // number)
    return [*moments[:2], *moments[2:-1:step], *moments[2:][-1:]]
