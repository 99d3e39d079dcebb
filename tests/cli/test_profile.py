"""`--profile`: where the time of a run went."""

from __future__ import annotations

import ollm
from ollm_core.cli.profile import profile_table
from ollm_core.profiling import Profile


def test_a_run_is_told(tiny, ids):
    """Every layer of every pass is in it, and all that was read; the logits are the same."""
    profile = Profile()
    with ollm.load(tiny, device="cpu", device_memory="560kB") as model:
        expected = model(ids(40)[None]).logits
    with ollm.load(tiny, device="cpu", device_memory="560kB", profile=profile) as model:
        cache = model.new_cache("host")
        found = model(ids(40)[None], past_key_values=cache).logits
        model(ids(1)[None], past_key_values=cache)
        stats = model.stats
    assert found.equal(expected)
    assert profile.totals["decode", "layer"].calls == 3
    assert profile.totals["prefill", "wait for weights"].calls >= 4
    assert profile.seconds("decode") >= stats.decode_seconds
    reads = [total for (_, name), total in profile.totals.items() if name == "read"]
    assert sum(total.numbers["num_bytes"] for total in reads) >= stats.weight_bytes_read > 0
    told = profile_table(profile, 10.0)
    assert "wait for weights" in told
    assert "choosing tokens" in told
