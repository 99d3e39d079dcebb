"""Memory over time."""

from __future__ import annotations

from types import SimpleNamespace

from ollm_core.server import history
from ollm_core.server.history import MemoryHistory


def test_the_highest_of_each_time_is_remembered_for_a_while(monkeypatch):
    """In order; what is older than ten minutes is told no more."""
    accounts = SimpleNamespace(device=SimpleNamespace(used=0), host=SimpleNamespace(used=0))
    now = 1000.0
    monkeypatch.setattr(history.time, "monotonic", lambda: now)
    kept = MemoryHistory(accounts)
    for second in range(1000):
        now = 1000.0 + second
        accounts.device.used, accounts.host.used = second, 1000 - second
        kept.note()
    samples = kept.read()
    assert len(samples) == 300
    assert samples[0][0] <= history.SECONDS
    assert [ago for ago, *_ in samples] == sorted((ago for ago, *_ in samples), reverse=True)
    assert samples[-1] == (1.0, 999, 2)  # of two notes the higher of each
