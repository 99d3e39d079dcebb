"""What `ollm run` says of weights that are read, and of a mixture of experts."""

from __future__ import annotations

from dataclasses import replace

from mixtures import open_moe

import ollm
from ollm_core.cli.report import json_report, summary
from ollm_core.text.answer_form import AnswerForm, Said


def test_run_tells_of_experts(make_moe, ids):
    """What `ollm run` says of experts, in JSON and in its summary; of a dense model it says
    nothing.
    """
    with open_moe(make_moe("mixtral")) as model:
        model(input_ids=ids(30)[None])
        stats = model.stats
    said = Said(AnswerForm())
    told = json_report(said, [], 30, stats)
    assert told["experts_routed"] == told["experts_read"] + told["experts_hit"] > 0
    assert told["expert_bytes_read"] == stats.expert_bytes_read > 0
    assert f"{stats.experts_routed} routed, " in summary(stats)
    dense = replace(stats, experts_routed=0)
    assert "experts_routed" not in json_report(said, [], 30, dense)
    assert "experts" not in summary(dense)


def test_weights_that_stay_are_not_read(tiny, ids):
    """Where all are resident nothing is read again, and nothing is divided by that."""
    with ollm.load(tiny, device="cpu") as model:
        model(input_ids=ids(9)[None])
        model(input_ids=ids(9)[None])
        told = summary(model.stats)
    assert "weights read  none in 2 passes: all are resident\n" in told
    with ollm.load(tiny, device="cpu", device_memory="510kB") as model:
        model(input_ids=ids(9)[None])
        assert " per pass, 1 passes, " in summary(model.stats)
