"""Full blocks on their way to the disk: served from memory until it has them."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from ollm_core.kv.disk.write_behind import WriteBehind

SLOT, OTHER = (0, 3), (1, 3)


@pytest.fixture
def writer():
    with ThreadPoolExecutor(1) as executor:
        yield executor


def block(value):
    """A block of one number, and the buffer that it lies in."""
    buffer = torch.full((8,), float(value))
    return buffer[:5], buffer


def test_a_block_that_waits_is_read_from_memory(writer):
    """Until it is written, and no longer; its buffer is then the next spare."""
    writes, may_go = WriteBehind([torch.zeros(8)], writer), threading.Event()
    tail, buffer = block(7)
    writes.put(SLOT, tail, buffer, lambda: may_go.wait(10))
    target = torch.zeros(5)
    assert writes.copy(SLOT, target)
    assert target.eq(7).all()
    assert not writes.copy(OTHER, target)
    may_go.set()
    writes.flush()
    assert not writes.copy(SLOT, target)
    assert writes.put(OTHER, *block(8), lambda: None) is buffer


def test_one_without_a_spare_waits_for_the_disk(writer):
    """No more blocks wait than there are buffers."""
    writes, may_go = WriteBehind([torch.zeros(8)], writer), threading.Event()
    writes.put(SLOT, *block(1), lambda: may_go.wait(10))
    second = threading.Thread(target=writes.put, args=(OTHER, *block(2), lambda: None))
    second.start()
    second.join(0.05)
    assert second.is_alive()
    may_go.set()
    second.join(10)
    assert not second.is_alive()
    writes.flush()


def test_a_failed_write_is_raised_until_it_is_forgotten(writer):
    """By every call that would go on; the block itself can still be read."""

    def fail():
        raise OSError(28, "No space left on device")

    writes = WriteBehind([torch.zeros(8)], writer)
    writes.put(SLOT, *block(3), fail)
    for call in (writes.flush, writes.check, lambda: writes.put(OTHER, *block(4), fail)):
        with pytest.raises(OSError, match="No space"):
            call()
    target = torch.zeros(5)
    assert writes.copy(SLOT, target)
    assert target.eq(3).all()
    writes.forget(SLOT)
    assert not writes.copy(SLOT, target)
    writes.put(OTHER, *block(4), lambda: None)
    writes.flush()
