"""What is copied to a device beside its compute, on a device that does things in any order that it
may.
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_bus import SimulatedBus

from ollm_core.device.upload import Upload

SIZE = 64


def check_on(bus, content, value):
    """An operator that reads `content` at its beginning and at its end."""
    found = []
    for _ in range(2):
        bus.compute(lambda: found.append(content.tolist() == [value] * SIZE))
    return found


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1 << 32),
    num_buffers=st.integers(1, 3),
    num_slots=st.integers(1, 3),
    ahead=st.booleans(),
    timed=st.booleans(),
)
def test_every_operator_reads_what_it_asked_for(seed, num_buffers, num_slots, ahead, timed):
    """Host buffers are filled again when they were copied, device buffers sent to again when they
    were released: each operator sees its own bytes from beginning to end.
    """
    bus = SimulatedBus(seed, queued=True)
    upload = Upload(bus, SIZE, num_buffers, timed=timed)
    slots = [bus.host_buffer(SIZE) for _ in range(num_slots)]
    copied = [None] * num_slots
    found, waiting = [], []

    def send(value):
        i = value % num_slots
        if copied[i] is not None:
            copied[i].synchronize()
        slots[i].fill_(value)
        sent = upload.send(slots[i])
        copied[i] = sent.copied
        return sent

    for value in range(8):
        sent = waiting.pop() if waiting else send(value)
        content = upload.receive(sent)
        if ahead and upload.has_room:
            waiting.append(send(value + 1))
        found.append(check_on(bus, content, value))
        upload.release(sent)
    for sent in waiting:
        upload.release(sent)
    upload.close()
    assert not bus.copying.todo
    slots.clear()
    bus.finish()
    assert all(all(each) and len(each) == 2 for each in found)


def test_a_copy_runs_beside_compute():
    """With two buffers the second copy ends though nothing is computed; with one it must wait."""
    for num_buffers in (1, 2):
        bus = SimulatedBus(5, queued=True)
        upload = Upload(bus, SIZE, num_buffers)
        host = bus.host_buffer(SIZE)
        first = upload.send(host)
        first.copied.synchronize()
        upload.receive(first)
        with bus.compute_is_busy():
            upload.release(first)
            second = upload.send(host)
            bus.go_on()
            assert second.copied.done == (num_buffers == 2)
        bus.finish()
        assert second.copied.done


def test_more_than_there_are_buffers_is_an_error():
    """Not a wrong result."""
    bus = SimulatedBus()
    upload = Upload(bus, SIZE, 2)
    host = bus.host_buffer(SIZE)
    sent = [upload.send(host) for _ in range(2)]
    assert not upload.has_room
    with pytest.raises(RuntimeError, match="in use"):
        upload.send(host)
    upload.release(sent[0])
    assert upload.send(host) is sent[0]


@pytest.mark.parametrize("seed", range(10))
def test_locked_memory_may_be_dropped_at_any_time(seed):
    """It is unlocked when the last copy from it has ended, and before it goes back."""
    bus = SimulatedBus(seed, queued=True)
    upload = Upload(bus, SIZE, 2)
    found = []
    for value in range(6):
        host = bus.host_buffer(SIZE).fill_(value)
        sent = upload.send(host)
        del host
        found.append(check_on(bus, upload.receive(sent), value))
        upload.release(sent)
        assert not bus.locked
    bus.finish()
    assert all(all(each) for each in found)


def test_memory_that_cannot_be_locked_will_do(caplog):
    """It is told once, and every byte is right."""
    bus = SimulatedBus(3, queued=True, refuses=True)
    upload = Upload(bus, SIZE, 2)
    found = []
    for value in range(5):
        host = bus.host_buffer(SIZE).fill_(value)
        sent = upload.send(host)
        host.fill_(200)  # at once: the driver took a copy
        found.append(check_on(bus, upload.receive(sent), value))
        upload.release(sent)
    bus.finish()
    assert all(all(each) for each in found)
    assert [record.message.split(":")[0] for record in caplog.records] == [
        "4.1 kB of host memory cannot be pinned for cpu, copies take longer"
    ]


def test_times_are_the_devices_own():
    """Bytes are counted always; how long copies took, and how long compute waited, if asked."""
    for timed in (False, True):
        bus = SimulatedBus(1, queued=True)
        upload = Upload(bus, SIZE, 2, timed=timed)
        host = bus.host_buffer(SIZE)
        for _ in range(4):
            sent = upload.send(host)
            upload.receive(sent)
            upload.release(sent)
        bus.finish()
        counters = upload.counters
        assert counters.num_bytes == 4 * SIZE
        assert (counters.copy_seconds > 0) == timed
        assert counters.waited_seconds >= 0
