"""What is followed without data takes what the same call takes with it."""

from __future__ import annotations

import pytest
import torch

import ollm
from ollm_core.engine.batch import NewTokens
from ollm_core.engine.layer_trace import LayerTrace, TracedCall
from ollm_core.memory.tracker import AllocationTracker

WIDE = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 2}


def trace_of(model):
    """Of the layers of an opened model."""
    return LayerTrace(model.engine._skeleton, model.engine._pass_planner._workspace._geometry)


@pytest.mark.parametrize("attention", ["exact", "blockwise"])
def test_a_traced_layer_takes_what_a_real_one_does(make_llama, ids, attention):
    """A pass over many tokens takes the traced peak of a layer, and beside it hidden states."""
    directory = make_llama(torch.float32, **WIDE)
    with ollm.load(directory, device="cpu", chunk_size=512, attention=attention) as model:
        cache = model.new_cache("disk")
        work = [NewTokens(cache.store.new_sequence(), ids(512), 0)]
        model.engine.run(cache.store, work)  # the weights that stay are there
        cache.store.truncate(work[0].sequence, 0)
        with AllocationTracker("cpu") as tracker:
            model.engine.run(cache.store, work)
        peak = trace_of(model).peak(TracedCall(0, 1, 512, 0, attention))
    hidden = 512 * 256 * 4
    assert peak <= tracker.peak <= peak + 3 * hidden


def test_rows_of_a_step_each_take_as_much(make_llama):
    """One token of each: a line in the rows."""
    with ollm.load(make_llama(torch.float32, **WIDE), device="cpu") as model:
        trace = trace_of(model)
        peaks = [trace.peak(TracedCall(1, rows, 1, 256, "exact")) for rows in (20, 40, 60)]
    assert 0 < peaks[1] - peaks[0] == peaks[2] - peaks[1]


def test_layers_that_hand_on_hidden_states_alone_hand_on_nothing_else(make_llama):
    """As Llama's do."""
    with ollm.load(make_llama(), device="cpu") as model:
        assert list(trace_of(model).handed(1, 8, 0, "exact")) == []
