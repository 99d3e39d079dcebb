"""Spans and their sums, the trace that Perfetto opens, and a run's own."""

from __future__ import annotations

import json
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollm_core import InputError
from ollm_core.profiling import Profile

TREES = st.recursive(
    st.just([]), lambda inner: st.lists(st.tuples(st.sampled_from("abc"), inner), max_size=3)
)


class Clock:
    """A second goes by whenever it is looked at."""

    def __init__(self):
        self.now = 0

    def __call__(self):
        self.now += 10**9
        return self.now


def walk(profile, tree):
    """Spans as a tree says."""
    for name, inner in tree:
        with profile.span(name):
            walk(profile, inner)


@given(TREES)
def test_sums_add_up_to_what_is_outermost(tree):
    """However spans lie inside each other, no second is counted twice or lost."""
    clock = Clock()
    profile = Profile(clock)
    for name, inner in tree:
        begin = clock.now
        before = profile.seconds(name)
        walk(profile, [(name, inner)])
        assert profile.seconds(name) - before == pytest.approx((clock.now - begin) / 1e9 - 1)


def test_a_span_that_fails_is_counted():
    """And what comes after it is not inside it."""
    profile = Profile(Clock())
    with pytest.raises(ValueError, match="odd"), profile.span("a"):
        raise ValueError("odd")
    with profile.span("b"):
        pass
    assert set(profile.totals) == {("a", "a"), ("b", "b")}


def test_threads_have_spans_of_their_own(tmp_path):
    """A reader's work is in no span of the thread that computes; the trace names both."""
    profile = Profile()
    with profile.span("decode"):
        reader = threading.Thread(target=walk, args=(profile, [("read", [])]), name="reader")
        reader.start()
        reader.join()
    assert set(profile.totals) == {("decode", "decode"), ("read", "read")}
    profile.write(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    spans = {names[event["tid"]]: event for event in events if event["ph"] == "X"}
    assert spans["reader"]["name"] == "read"
    outer, inner = spans[threading.current_thread().name], spans["reader"]
    assert outer["ts"] <= inner["ts"]
    assert inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"]


def test_a_trace_ends_somewhere(tmp_path):
    """Spans beyond the limit are summed only."""
    profile = Profile(Clock(), max_events=2)
    walk(profile, [("a", [])] * 5)
    assert profile.totals["a", "a"].calls == 5
    profile.write(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert sum(event["ph"] == "X" for event in events) == 2
    with pytest.raises(InputError, match="cannot write"):
        profile.write(tmp_path / "no" / "trace.json")
