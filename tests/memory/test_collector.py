"""The garbage collector while a model is opened."""

import gc

import pytest

import ollm
from ollm_core.memory.collector import paused_collector
from ollm_core.options import PlanOptions
from ollm_core.planning.planner import Planner


@pytest.fixture(autouse=True)
def _as_before():
    yield
    gc.enable()


@paused_collector()
def fails():
    assert not gc.isenabled()
    return 1 / 0


def test_the_collector_is_paused_and_then_as_before():
    """After an error too; and one that the user has switched off stays off."""
    with paused_collector():
        with paused_collector():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        fails()
    assert gc.isenabled()
    gc.disable()
    with paused_collector():
        assert not gc.isenabled()
    assert not gc.isenabled()


def test_a_model_is_opened_and_planned_without_collections(make_llama):
    """However many objects are made; afterwards the collector is as before."""
    directory, seen = make_llama(), []
    thresholds = gc.get_threshold()
    options = PlanOptions(device="cpu")
    gc.callbacks.append(lambda phase, _: seen.append(phase))
    try:
        gc.set_threshold(1)  # a collection at almost every object
        with ollm.load(directory, device="cpu"):
            opened = len(seen)
        Planner(directory, options)
        planned = len(seen)
        [[] for _ in range(1000)]
        afterwards = len(seen) - planned
    finally:
        gc.callbacks.pop()
        gc.set_threshold(*thresholds)
    assert opened < 500
    assert planned - opened < 5000
    assert afterwards > 500
