"""Values of the device and the host, memory by memory."""

from __future__ import annotations

from ollm_core.memory.accounts import open_accounts
from ollm_core.memory.pair import PerMemory, added


def test_accounts_of_limits():
    """Each has its own limit and name; what is done to both keeps them apart."""
    accounts = open_accounts(PerMemory(3, 5))
    assert accounts.map(lambda account: account.limit) == PerMemory(3, 5)
    accounts.host.reserve("table", 4)
    assert accounts.map(lambda account: account.free) == PerMemory(3, 1)
    assert [account.name for account in accounts] == ["device memory", "host memory"]


def test_sums_keep_memories_apart():
    """Pairs are tuples, whose own sum would be one of four."""
    assert added(PerMemory(1, 10), PerMemory(2, 20), PerMemory(3, 30)) == PerMemory(6, 60)
