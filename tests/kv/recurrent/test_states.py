"""Recurrent states of sequences: how many are held, and what is refused."""

from __future__ import annotations

import pytest
import torch
from kept_states import (
    check_tokens,
    new_store,
    run,
)

from ollm_core import DoesNotFitError, KVStoreError

SET_BYTES = 2 * (3 * 2 * 2 + 2 * 2 * 4)


def test_one_set_of_states_then_two():
    """A prompt takes one state a layer; what follows also holds where it began."""
    store, account = new_store()
    sequence = store.new_sequence()
    run(store, sequence, [], [1, 2, 3, 4, 5, 6, 7])
    assert account.used == SET_BYTES
    for token in (8, 9, 10):
        run(store, sequence, list(range(1, token)), [token])
        assert account.used == 2 * SET_BYTES
    assert account.peak == 2 * SET_BYTES
    assert store.tier_bytes().device == 2 * SET_BYTES + store._attention.tier_bytes().device


def test_what_does_not_fit_changes_nothing():
    """A refusal leaves the sequence as it was, in all layers."""
    store, account = new_store(limit=2 * SET_BYTES)
    sequence = store.new_sequence()
    run(store, sequence, [], [1, 2])
    held = store.tier_bytes()
    store.expect(sequence, 2)
    with pytest.raises(DoesNotFitError):
        store.reserve(sequence, 5)
    assert store.tier_bytes() == held
    check_tokens(store, sequence, [1, 2])
    assert account.used == SET_BYTES


def test_a_state_of_another_shape_is_refused():
    """With what was given and what was expected."""
    store, _ = new_store()
    sequence = store.new_sequence()
    store.reserve(sequence, 1)
    with pytest.raises(KVStoreError, match=r"layer 0 is float32 \[3, 2\].*expected bfloat16"):
        store.put_state(0, sequence, 1, (torch.zeros(3, 2), torch.zeros(2, 2)))
    with pytest.raises(KVStoreError, match="layer 0 has no keys and values"):
        store.append(0, sequence, torch.zeros(1, 1, 2), torch.zeros(1, 1, 2))
