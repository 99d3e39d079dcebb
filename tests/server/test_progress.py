"""How far a pass is, and the time that is left."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ollm_core.contracts.progress import Progress
from ollm_core.server import progress as module
from ollm_core.server.progress import Pass, PassWatch, standing

STEP = Progress("prefill", 0, 10, 100, 3, 0)


def test_a_pass_is_watched_from_its_first_step(monkeypatch):
    """Its share and its time; none before the first pass, and after the last step."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    watch = PassWatch()
    assert watch.current is None
    watch(replace(STEP, stage="check"))
    assert watch.current is None
    for done in (1, 5):
        watch(replace(STEP, steps_done=done))
        now[0] += 2
    assert watch.current == Pass(0.5, 100, 4.0)
    assert watch.current.seconds_in_all == 8.0
    watch(replace(STEP, steps_done=10))
    assert watch.current is None
    watch(replace(STEP, steps_done=1, weight_passes=4))
    assert watch.current == Pass(0.1, 100, 0.0)


@pytest.mark.parametrize(
    ("num_read", "current", "expected"),
    [
        (None, None, {"state": "waiting", "read_tokens": 0}),
        (None, Pass(0.5, 9, 3.0), {"state": "waiting", "read_tokens": 0, "pass": 0.5}),
        (0, Pass(0.001, 900, 3.0), {"state": "reading", "read_tokens": 0, "pass": 0.001}),
        # half of the pass that reads the rest
        (0, Pass(0.5, 300, 3.0), {"state": "reading", "read_tokens": 0, "pass": 0.5,
                                  "seconds_left": 3.0}),
        # three quarters, and two passes more
        (100, Pass(0.75, 80, 6.0), {"state": "reading", "read_tokens": 100, "pass": 0.75,
                                    "seconds_left": 18.0}),
    ],
)  # fmt: skip
def test_the_time_to_the_first_token(num_read, current, expected):
    """By the pass that runs, as far as it can be told."""
    assert standing(300, num_read, current) == {"prompt_tokens": 300, **expected}
