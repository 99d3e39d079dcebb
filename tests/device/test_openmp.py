"""The threads of a thread that does not compute any more."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest
import torch
from text_requests import greedy

import ollm
from ollm_core.device import openmp
from ollm_core.device.openmp import release_openmp_threads
from ollm_core.serving.session import Session

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="the system does not tell threads")


def tasks():
    """Of this process, Python's and others."""
    return {*os.listdir("/proc/self/task")}


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    release_openmp_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
    release_openmp_threads()


def computed():
    """A sum that is large enough for several threads."""
    return torch.ones(1 << 20).add(1.0).sum().item()


def team():
    """The threads that computing starts."""
    before = tasks()
    computed()
    if not (started := tasks() - before):
        pytest.skip("torch computes with another library")
    return started


def have_ended(threads):
    """Whether all do, soon."""
    until = time.monotonic() + 5
    while tasks() & threads and time.monotonic() < until:
        time.sleep(0.01)
    return not tasks() & threads


@needs_linux
def test_they_end_and_others_are_started(two_threads):
    """Nothing else of the process does, and the number of threads stays."""
    before = tasks()
    started = team()
    release_openmp_threads()
    assert have_ended(started)
    assert before <= tasks()
    assert torch.get_num_threads() == 2
    team()


@needs_linux
def test_the_thread_that_has_opened_or_asked_has_none_left(two_threads, tiny):
    """So that another may ask, without a wait for threads that wait."""
    started = team()
    with ollm.load(tiny, device="cpu") as model:
        assert have_ended(started)
        for asked in (
            lambda: model.generate(torch.tensor([[1, 2]]), max_new_tokens=2, do_sample=False),
            lambda: model.answer([greedy([1, 2], 2)]),
            lambda: Session(model.open_scheduler()).close(),
        ):
            started = team()
            asked()
            assert have_ended(started)


def test_a_system_that_does_not_tell(monkeypatch, tmp_path):
    """No error, and numbers as before."""
    monkeypatch.setattr(openmp, "_MAPS", Path(tmp_path / "maps"))
    release_openmp_threads()
    assert computed() == 2.0 * (1 << 20)
