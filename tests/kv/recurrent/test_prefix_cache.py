"""States that are kept on disk: which of them the next run finds."""

from __future__ import annotations

import torch
from kept_states import (
    PROMPT,
    found,
    keep_a_run,
    keeping,
    run,
)


def test_kept_states_are_found(tmp_path):
    """After the prompt, at its last edge of chunks, and after the answer; nowhere else."""
    keep_a_run(tmp_path, PROMPT, answer=[50, 51, 52])
    assert found(tmp_path, [*PROMPT, 50, 51, 52, 60]) == 24
    assert found(tmp_path, [*PROMPT, 50, 70]) == 21
    assert found(tmp_path, [*PROMPT[:-1], 70, 71]) == 20
    assert found(tmp_path, [*PROMPT[:18], 70, 71]) == 0


def test_states_of_forks_are_kept(tmp_path):
    """A row that was copied or moved, as beams are, has its state kept with no pass after that."""
    with keeping(tmp_path) as store:
        sequence = store.new_sequence()
        run(store, sequence, [], PROMPT)
        store.commit(sequence)
        store.keep(sequence, 0, torch.tensor(PROMPT))
        run(store, sequence, PROMPT, [50])
        store.commit(sequence)
        store.keep(sequence, len(PROMPT), torch.tensor([50]))
        store.fork(sequence)
        store.release(sequence)
    assert found(tmp_path, [*PROMPT, 50, 60]) == 22


def test_long_prompts_keep_states_on_their_way(tmp_path, monkeypatch):
    """One about every so many tokens."""
    monkeypatch.setattr("ollm_core.kv.recurrent.prefix_cache.SPACING", 8)
    keep_a_run(tmp_path, PROMPT)
    assert found(tmp_path, [*PROMPT[:18], 70, 71]) == 16
    assert found(tmp_path, [*PROMPT[:13], 70, 71]) == 8
