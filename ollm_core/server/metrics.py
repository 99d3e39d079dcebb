"""The page of `/metrics`: Prometheus' text format, version 0.0.4."""

from __future__ import annotations

from collections.abc import Mapping

from ollm_core.contracts.progress import Stats
from ollm_core.server.meter import Meter, Times

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_OF_MODEL: Mapping[str, tuple[str, str, str]] = {
    "weight_passes": ("counter", "weight_passes_total", "Passes over the weights."),
    "weight_bytes_read": ("counter", "weight_read_bytes_total", "Of weights, read from storage."),
    "read_seconds": ("counter", "weight_read_seconds_total", "Spent reading those."),
    "waited_seconds": ("counter", "weight_waited_seconds_total", "That passes waited for weights."),
    "kv_bytes_read": ("counter", "kv_read_bytes_total", "Of keys and values, read."),
    "prefill_tokens": ("counter", "prefill_tokens_total", "Tokens of prompts that were computed."),
    "prefill_seconds": ("counter", "prefill_seconds_total", "Of passes that read prompts."),
    "decode_tokens": ("counter", "decode_tokens_total", "Tokens of passes that only decode."),
    "decode_seconds": ("counter", "decode_seconds_total", "Of those passes."),
    "drafted_tokens": (
        "counter",
        "drafted_tokens_total",
        "Guessed, and checked.",
    ),
    "accepted_tokens": ("counter", "drafted_tokens_accepted_total", "Of those, right."),
    "times_short": ("counter", "memory_short_total", "Times that memory ran short."),
    "weight_bytes": ("gauge", "weight_bytes", "Of the model's weights."),
    "resident_bytes": ("gauge", "weight_resident_bytes", "Of those, kept in memory."),
    "device_limit_bytes": ("gauge", "device_memory_limit_bytes", "Most device memory."),
    "device_peak_bytes": ("gauge", "device_memory_peak_bytes", "Most that was used of it."),
    "host_limit_bytes": ("gauge", "host_memory_limit_bytes", "Most host memory."),
    "host_peak_bytes": ("gauge", "host_memory_peak_bytes", "Most that was used of it."),
    "kv_disk_bytes": ("gauge", "kv_disk_peak_bytes", "Most disk that keys and values took."),
}
"""Fields of Stats: kind, name and help of each."""


class _Page:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def add(self, kind: str, name: str, about: str, samples: Mapping[str, float]) -> None:
        """`samples` are values by what stands behind the name: labels, or a suffix."""
        self.lines += [f"# HELP ollm_{name} {about}", f"# TYPE ollm_{name} {kind}"]
        self.lines += [f"ollm_{name}{rest} {value!r}" for rest, value in samples.items()]

    def times(self, name: str, about: str, times: Times) -> None:
        quantiles = {f'{{quantile="{key}"}}': one for key, one in times.quantiles().items()}
        self.add("summary", name, about, {**quantiles, "_sum": times.sum, "_count": times.number})


def metrics_page(
    meter: Meter,
    stats: Stats,
    *,
    places: tuple[int, int],
    texts: tuple[int, int],
    kept: tuple[int, int] = (0, 0),
    disk_bytes_per_second: float = 0.0,
) -> str:
    """The page. `places` are those that are taken, and all; `texts` those that wait, and run;
    `kept` are answers, and their bytes. `disk_bytes_per_second` is what the disk was measured to
    give, 0.0 if it was not.
    """
    page = _Page()
    ended = {
        f'{{path="{path}",status="{status}"}}': number
        for (path, status), number in sorted(meter.requests.items())
    }
    page.add("counter", "requests_total", "Requests that have ended.", ended)
    hits = _ratio(meter.num_cached_tokens, meter.num_prompt_tokens)
    per_token = _ratio(stats.weight_bytes_read, meter.num_new_tokens)
    share = _ratio(stats.weight_bytes_read, stats.read_seconds * disk_bytes_per_second)
    gauges: Mapping[str, tuple[str, float]] = {
        "requests": ("Requests, running or waiting.", places[0]),
        "requests_limit": ("Most of them at once.", places[1]),
        "texts_waiting": ("Texts that are in no pass yet.", texts[0]),
        "texts_running": ("Texts that take part in passes.", texts[1]),
        "answers_kept": ("Answers that can be fetched again.", kept[0]),
        "answers_kept_bytes": ("Of those.", kept[1]),
        "prefix_cache_hit_ratio": ("Tokens of prompts that were found in it.", hits),
        "weight_read_bytes_per_new_token": ("Read from storage, in all.", per_token),
        "weight_read_disk_ratio": ("Speed of reading weights, of the disk's; 0: unknown.", share),
    }
    counters: Mapping[str, tuple[str, float]] = {
        "prompt_tokens_total": ("Tokens of answered prompts.", meter.num_prompt_tokens),
        "prompt_tokens_cached_total": ("Of those, found cached.", meter.num_cached_tokens),
        "new_tokens_total": ("New tokens.", meter.num_new_tokens),
    }
    for kind, several in (("gauge", gauges), ("counter", counters)):
        for name, (about, value) in several.items():
            page.add(kind, name, about, {"": value})
    page.times("first_token_seconds", "From a request to its first token.", meter.first_token)
    page.times("next_token_seconds", "From a token of an answer to the next.", meter.next_token)
    for field, (kind, name, about) in _OF_MODEL.items():
        page.add(kind, name, about, {"": getattr(stats, field)})
    return "\n".join(page.lines) + "\n"


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
