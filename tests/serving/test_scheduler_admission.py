"""What it costs to admit many requests at once."""

from __future__ import annotations

import torch
from text_requests import greedy

from ollm_core.api import load
from ollm_core.engine import pass_planner


def admitted(model, ids, budget=None):
    """Of a hundred short requests, how many run at once; and how many shapes were traced."""
    model.engine._pass_planner._workspace._known.clear()
    if budget is not None:
        model.accounts.device.limit = budget
    with model.open_scheduler() as scheduler:
        for number in range(100):
            scheduler.add(greedy(ids(3 + number % 20, number)))
        with torch.no_grad():
            scheduler._admit()
        return scheduler.num_running, len(model.engine._pass_planner._workspace._known)


def test_a_hundred_short_requests_are_admitted_by_a_few_traces(make_llama, ids, monkeypatch):
    """As many as by asking about every number, whether all of them fit or not."""
    with load(make_llama(torch.float32), device="cpu", chunk_size=64, kv="device") as model:
        plenty = model.accounts.device.limit
        budgets = [plenty, *(model.accounts.device.used + n for n in (1_000_000, 3_000_000))]
        found = [admitted(model, ids, budget) for budget in budgets]
        monkeypatch.setattr(pass_planner, "row_steps", lambda number: [1])
        assert [num for num, _ in found] == [admitted(model, ids, one)[0] for one in budgets]
    assert found[0][0] == 100
    assert 1 < found[1][0] < found[2][0] < 100
    assert max(traced for _, traced in found) <= 24
