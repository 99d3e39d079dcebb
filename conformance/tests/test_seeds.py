"""A run draws what its seed says, and says which that was."""

from __future__ import annotations

import threading

import pytest
import torch
from power import results

from ollm_conformance import seeds
from ollm_conformance.checks import check


class Toy:
    """A check that keeps what it drew, and fails."""

    seen: list = []  # noqa: RUF012

    @classmethod
    def subject_name(cls, config):
        return "toy"

    @check("toy.draws", "It draws.", look="nowhere")
    def test_draws(self):
        self.seen.append(torch.rand(3, generator=seeds.drawn(7)).tolist())
        raise AssertionError("expected luck, got none")


def test_a_seed_draws_the_same_again_and_another_one_others(capfd):
    """Twice the same numbers for one seed, others for the next; a failure says how to see it."""
    Toy.seen.clear()
    for seed in (5, 5, 6):
        results(Toy, options=[f"--ollm-seed={seed}"])
        told = capfd.readouterr().out
        assert f"again by:  --ollm-checks toy.draws --ollm-seed {seed}" in told
        assert f"seed {seed} (--ollm-seed N draws others)" in told
    first, again, other = Toy.seen
    assert first == again != other


def test_threads_draw_what_their_run_draws():
    """The seed is that of the run, in each of its threads."""
    found = []
    seeds.begin(3)
    try:
        thread = threading.Thread(target=lambda: found.append(seeds.run_seed()))
        thread.start()
        thread.join()
    finally:
        seeds.end()
    assert found == [3]


@pytest.mark.parametrize("seed", [0, 4])
def test_things_of_one_run_do_not_draw_the_same(seed):
    """Each thing has numbers of its own."""
    seeds.begin(seed)
    try:
        drawn = {float(torch.rand(1, generator=seeds.drawn(n))) for n in range(50)}
    finally:
        seeds.end()
    assert len(drawn) == 50
