"""A store's share of an account, and buffers that iterators take turns with."""

from __future__ import annotations

import pytest

from ollm_core import DoesNotFitError
from ollm_core.kv.buffer_pool import BufferPool, Charges
from ollm_core.memory.accounts import MemoryAccount


def test_closing_gives_back_what_one_store_took():
    """And nothing of what another has in the same account; later gifts are ignored."""
    account = MemoryAccount("memory", 100)
    mine, other = Charges(account), Charges(account)
    mine.take("a", 30)
    mine.take("b", 20)
    other.take("a", 40)
    with pytest.raises(DoesNotFitError):
        mine.take("b", 11)
    assert (mine.num_bytes, account.used) == (50, 90)
    mine.give("a", 10)
    mine.close()
    mine.give("a", 20)
    mine.close()
    assert (mine.num_bytes, account.used) == (0, 40)


def test_one_set_of_buffers_stays():
    """Each of several users has a set of its own; only one is charged for when they are gone."""
    account = MemoryAccount("memory", 20)
    pool = BufferPool(object, 10, "buffers", Charges(account))
    with pool.lane() as first, pool.lane() as second:
        assert first is not second
        assert account.used == 20
        with pytest.raises(DoesNotFitError), pool.lane():
            pass
    assert account.used == 10
    with pool.lane() as again:
        assert again is second or again is first
        assert account.used == 10


def test_buffers_that_cannot_be_made_cost_nothing():
    """The charge is undone."""
    account = MemoryAccount("memory", 20)

    def fail():
        raise MemoryError

    with pytest.raises(MemoryError):
        BufferPool(fail, 10, "buffers", Charges(account))
    assert account.used == 0
