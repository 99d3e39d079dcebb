"""Each counter is declared once, and somebody writes it."""

from __future__ import annotations

import ast
import threading
from dataclasses import fields, replace
from pathlib import Path

import torch

from ollm import Stats
from ollm_core.engine import counters
from ollm_core.engine.batch import NewTokens
from ollm_core.engine.counters import Counters
from ollm_core.engine.pass_planner import PassPlan
from ollm_core.memory.pair import PerMemory

PLAN = PassPlan((), 64, "exact", False, PerMemory({}, {}))


def test_every_counter_is_written():
    """A field of Stats that counters.py does not name would be 0 for ever."""
    tree = ast.parse(Path(counters.__file__).read_text())
    names = {node.arg for node in ast.walk(tree) if isinstance(node, ast.keyword)}
    names |= {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    assert not {one.name for one in fields(Stats)} - names


def test_a_prompt_a_token_and_a_draft():
    """Each is counted as what it is; right drafts are tokens that their pass has given more."""
    one = Counters()
    ids = torch.zeros(5, dtype=torch.long)
    one.count_pass([NewTokens(0, ids, 0)], PLAN, 2.0, 100)
    one.count_pass([NewTokens(0, ids[:1], 5), NewTokens(1, ids[:1], 3)], PLAN, 0.5, 10)
    one.count_pass([NewTokens(0, ids[:4], 6, 4, 3)], PLAN, 0.25, 1)
    one.count_drafting(0.125)
    one.count_accepted(2)
    for num_bytes in (70, 90, 80):
        one.count_kv_on_disk(num_bytes)
    assert one.last_plan is PLAN
    assert one.counted == Stats(
        weight_passes=3,
        prefill_tokens=5,
        prefill_seconds=2.0,
        decode_tokens=2 + 1 + 2,
        decode_seconds=0.875,
        drafted_tokens=3,
        accepted_tokens=2,
        undrafted_passes=1,
        kv_bytes_read=111,
        kv_disk_bytes=90,
    )


def test_threads_lose_no_count():
    """A draft source of one thread counts while another's pass does."""
    one = Counters()

    def count() -> None:
        for _ in range(500):
            one.count_drafting(1.0)
            one.count_cached(1)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert one.counted == Stats(decode_seconds=2000.0, cached_tokens=2000)


def test_json_of_a_run():
    """Keys that programs read, in their order; experts and drafts where there are any."""
    always = [
        *("device_peak_bytes", "host_peak_bytes", "weight_bytes_read", "kv_bytes_read"),
        *("weight_passes", "times_short"),
    ]
    experts = ["experts_routed", "experts_hit", "experts_read", "expert_bytes_read"]
    drafts = ["drafted_tokens", "accepted_tokens", "undrafted_passes"]
    stats = Stats(weight_passes=7, accepted_tokens=3)
    routed = replace(stats, experts_routed=5)
    assert [*stats.for_json(drafting=False)] == always
    assert [*stats.for_json(drafting=True)] == always + drafts
    assert [*routed.for_json(drafting=True)] == always + experts + drafts
    assert routed.for_json(drafting=True)["accepted_tokens"] == 3
