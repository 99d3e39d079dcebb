"""The page for Prometheus, and what is counted for it."""

from __future__ import annotations

import re

from ollm_core.contracts.progress import Stats
from ollm_core.server import meter as module
from ollm_core.server.meter import Meter, Stopwatch, Times
from ollm_core.server.metrics import metrics_page
from ollm_core.serving.request import Counts, Finished, NewToken


def test_times_have_quantiles_by_the_nearest_rank():
    """Of the last few thousand; the number and the sum are of all."""
    times = Times()
    assert times.quantiles() == {}
    for number in range(1, 101):
        times.add(number)
    assert times.quantiles() == {0.5: 50, 0.95: 95, 0.99: 99}
    assert (times.number, times.sum) == (100, 5050)


def test_a_stopwatch_tells_first_tokens_from_later_ones(monkeypatch):
    """And counts prompts when they are answered, not when a client has left."""
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    meter = Meter()
    watch = Stopwatch(meter)
    for seconds in (5, 1, 2):
        now[0] += seconds
        watch.count(NewToken("a", 0, 7, "x"))
    watch.count(Finished("a", 0, "stop", "", Counts(num_prompt_tokens=9, num_cached_tokens=4)))
    watch.count(Finished("a", 1, "cancelled", "", Counts(num_prompt_tokens=9)))
    assert (meter.first_token.sum, meter.next_token.sum, meter.next_token.number) == (5, 3, 2)
    assert (meter.num_new_tokens, meter.num_prompt_tokens, meter.num_cached_tokens) == (3, 9, 4)


def test_the_page_is_in_prometheus_text_format():
    """Every line is a comment or a sample, every name is told of once, and the values are right."""
    meter = Meter()
    meter.requests["/v1/x", 200] = 3
    meter.num_prompt_tokens, meter.num_cached_tokens, meter.num_new_tokens = 200, 50, 10
    meter.next_token.add(0.25)
    stats = Stats(
        weight_bytes_read=1000, read_seconds=2.0, device_peak_bytes=7, device_limit_bytes=9
    )
    page = metrics_page(meter, stats, places=(2, 64), texts=(1, 5), disk_bytes_per_second=2000.0)
    labels = r"(?:\{[a-z]+=\"[^\"]+\"(?:,[a-z]+=\"[^\"]+\")*\})?"
    samples = dict(re.findall(rf"^(ollm_[a-z_]+{labels}) (\S+)$", page, re.M))
    assert len(samples) == sum(not line.startswith("#") for line in page.splitlines())
    types = re.findall(r"^# TYPE (\S+) (?:counter|gauge|summary)$", page, re.M)
    assert len(types) == len(set(types)) == page.count("# HELP ")
    expected = {
        'ollm_requests_total{path="/v1/x",status="200"}': 3, "ollm_requests": 2,
        "ollm_requests_limit": 64, "ollm_texts_waiting": 1, "ollm_texts_running": 5,
        "ollm_prefix_cache_hit_ratio": 0.25, "ollm_weight_read_bytes_per_new_token": 100,
        "ollm_weight_read_disk_ratio": 0.25,
        'ollm_next_token_seconds{quantile="0.99"}': 0.25, "ollm_next_token_seconds_count": 1,
        "ollm_device_memory_peak_bytes": 7, "ollm_device_memory_limit_bytes": 9,
    }  # fmt: skip
    assert {name: float(samples[name]) for name in expected} == expected
    assert "ollm_first_token_seconds_sum" in samples


def test_a_page_of_nothing():
    """Before the first request."""
    page = metrics_page(Meter(), Stats(), places=(0, 1), texts=(0, 0))
    assert "ollm_prefix_cache_hit_ratio 0.0" in page
    assert "ollm_weight_read_disk_ratio 0.0" in page
