"""Progress of weight passes, as it is reported."""

from __future__ import annotations

import ollm


def test_progress_tells_every_step(tiny, ids):
    """Progress starts at zero, never goes back within a pass, and ends complete."""
    seen = []
    with ollm.load(tiny, device="cpu", chunk_size=16, on_progress=seen.append) as model:
        model.generate(ids(40)[None], max_new_tokens=2, do_sample=False, eos_token_id=None)
    prefill = [p for p in seen if p.stage == "prefill"]
    assert [p.steps_done for p in prefill] == list(range(3 * 3 + 2))
    assert {p.steps_total for p in prefill} == {3 * 3 + 1}
    assert [p.stage for p in seen[len(prefill) :]] == ["decode"] * 5
