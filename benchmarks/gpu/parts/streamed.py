"""Llama-3-8B with its weights on the card, in host memory and on the disk: how much of reading,
copying and computing goes on at the same time, and how near memory and time are to the plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median_high
from typing import Any

from benchmarks.gpu.parts.checkpoints import llama
from benchmarks.gpu.parts.runs import disk_limit, fault_of, measured, share, told_of
from benchmarks.gpu.parts.speeds import bus_rates
from benchmarks.gpu.parts.work import OutOfTime, Tell, Work
from ollm_core.profiling import Profile

_PLACES: Mapping[str, Mapping[str, Any]] = {
    "card": {"kv": "device", "attention": "exact"},
    "disk": {"kv": "device", "attention": "exact", "device_layers": 0, "host_layers": 0},
    "host": {"kv": "device", "attention": "exact", "device_layers": 0},
    "8 GB card": {"kv": "auto", "attention": "auto"},
}
"""Where the weights are, by what `ollm.load` is told."""


def run(work: Work, tell: Tell, _: str = "") -> None:
    """A finding for each place, for what overlaps, and for where the time goes. Raises
    OutOfTime.
    """
    checkpoint = llama(work)
    num_tokens, num_new = (24, 3) if work.small else (512, 8)
    limit, bus = disk_limit(checkpoint), bus_rates(work)
    found: dict[str, dict[str, Any]] = {}
    for place, options in _PLACES.items():
        if work.seconds_left < 8:
            raise OutOfTime(f"weights in {place} were not measured, nor what comes after")
        kept = {**options, **_budgets(work, place)}
        profile = Profile() if place in ("disk", "host") else None
        one = measured(
            work,
            checkpoint,
            num_tokens,
            3 if place == "disk" else num_new,
            warming=place != "disk",
            profile=profile,
            **kept,
        )
        one["disk_limit_gb_s"], one["share_of_disk"] = round(limit, 3), share(one, limit)
        found[place] = one
        fault = fault_of(one, _first(found["card"], one))
        tell(f"weights on {place}", told_of(one), fault=fault, **one)
        if place != "card" and "card" in found:
            lapped = overlap(one, found["card"], limit, bus, checkpoint.embedding_bytes)
            tell(f"overlap, {place}", _told(lapped), **lapped)
        if profile is not None:
            _tell_profile(place, profile, tell)


def overlap(
    one: Mapping[str, Any],
    kept: Mapping[str, Any],
    limit: float,
    bus: Mapping[str, float],
    embedding_bytes: int,
) -> dict[str, Any]:
    """Seconds of a decoded token, beside what reading, copying and computing would take alone; of
    computing only what a run says that has `kept` all layers on the device.
    """
    streamed = one["weight_bytes"] - embedding_bytes - one["weights_on_device_bytes"]
    fastest = max(rate for name, rate in bus.items() if name.endswith("to device"))
    alone = {"read": one["read_bytes_per_pass"] / limit / 1e9, "copy": max(streamed, 0) / fastest}
    if kept["device_layers"] == kept["num_layers"]:
        alone["compute"] = _step(kept)
    step = _step(one)
    slowest = max(alone, key=lambda name: alone[name])
    return {
        "step_seconds": round(step, 5),
        "alone_seconds": {name: round(seconds, 5) for name, seconds in alone.items()},
        "slowest": slowest,
        "share_of_slowest": round(alone[slowest] / step, 3),
        "one_after_the_other_seconds": round(sum(alone.values()), 5),
    }


def _told(lapped: Mapping[str, Any]) -> str:
    alone = ", ".join(f"{name} {value:.4f}" for name, value in lapped["alone_seconds"].items())
    return (
        f"a token {lapped['step_seconds']:.4f} s; alone {alone}: "
        f"{lapped['share_of_slowest']:.0%} of the slowest, which is to {lapped['slowest']}"
    )


def _step(found: Mapping[str, Any]) -> float:
    """The median of the tokens' seconds."""
    return float(median_high(found["step_seconds"]))


def _first(expected: Mapping[str, Any], one: Mapping[str, Any]) -> dict[str, Any] | None:
    """As many tokens as `one` has; none to expect of another attention or chunk size."""
    if any(expected[key] != one[key] for key in ("attention", "chunk_size")):
        return None
    return {"tokens": expected["tokens"][: len(one["tokens"])]}


def _budgets(work: Work, place: str) -> dict[str, Any]:
    """An 8 GB card in a PC of 16 GB, or what the real one has."""
    if work.small:
        return {"device_memory": "40MB", "host_memory": "200MB"} | _host_layers(work, place)
    if place == "8 GB card":
        return {"device_memory": "7500MB", "host_memory": "12GB"}
    return _host_layers(work, place)


def _host_layers(work: Work, place: str) -> dict[str, Any]:
    """On a CPU there is no host beside the device."""
    return {} if work.on_card or place == "card" else {"host_layers": None}


def _tell_profile(place: str, profile: Profile, tell: Tell) -> None:
    """The spans of a run, by the outermost one and their own name."""
    totals = {
        f"{outer} / {name}": {"calls": total.calls, "seconds": round(total.seconds, 4)}
        for (outer, name), total in sorted(
            profile.totals.items(), key=lambda item: -item[1].seconds
        )
    }
    most = ", ".join(f"{name} {one['seconds']:.2f} s" for name, one in list(totals.items())[:4])
    tell(f"time, {place}", most, totals=totals)
