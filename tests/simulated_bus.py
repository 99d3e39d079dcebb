"""A device with memory of its own, on the CPU: streams are queues of operations on real tensors,
which run in any order that events allow.
"""

from __future__ import annotations

import ctypes
import random
import threading
from collections import deque
from contextlib import contextmanager

import torch

from ollm_core.device.transfer import Bus

CPU = torch.device("cpu")


class Place:
    """An event."""

    def __init__(self, bus):
        self._bus = bus
        self.marks = 0  # how often it was asked for, and reached: only the last one counts
        self.reached = 0
        self.at = 0

    @property
    def done(self):
        return self.reached == self.marks

    def query(self):
        with self._bus.lock_:
            self._bus.progress()
            return self.done

    def synchronize(self):
        self._bus.run_until(self)

    def elapsed_time(self, end_event):
        return float(end_event.at - self.at)


class Queue:
    """A stream. Each entry is an operation, and the event that it waits for, if any."""

    def __init__(self, bus):
        self.bus = bus
        self.todo = deque()

    def wait_event(self, event):
        self.put(lambda: None, event)

    def record_event(self, event=None):
        event = event or Place(self.bus)
        event.marks += 1
        mark = event.marks

        def reach():
            event.reached, event.at = max(event.reached, mark), self.bus.time

        self.put(reach)
        return event

    def put(self, operation, event=None):
        with self.bus.lock_:
            # As CUDA does: what is waited for is the event as it is marked now.
            self.todo.append((operation, event, event.marks if event else 0))
            self.bus.progress()

    @property
    def can_go_on(self):
        return bool(self.todo) and (
            self.todo[0][1] is None or self.todo[0][1].reached >= self.todo[0][2]
        )

    def step(self):
        operation, _, _ = self.todo.popleft()
        self.bus.time += 1
        operation()


class HostQueue(Queue):
    """The stream of operators that the host runs itself: it is always where the host is."""

    def wait_event(self, event):
        self.bus.run_until(event)

    def put(self, operation, event=None):
        assert event is None
        operation()


class SimulatedBus(Bus):
    """Two queues. `seed` says which goes on, and when: whether the device is quick or does things
    as late as it may, and whether it likes to copy or to compute. With `queued`, operators are
    queued too, by `compute`; otherwise the host runs them, and what they wait for just before.
    """

    def __init__(self, seed=0, *, queued=False, refuses=False):
        super().__init__(CPU)
        self._choices = random.Random(seed)
        self._most_steps = self._choices.choice([0, 1, 4, 20])
        self._copies_first = self._choices.choice([0.0, 0.1, 0.5, 0.9, 1.0])
        self.lock_ = threading.RLock()
        self.time = 0
        self.num_copies = 0
        self.faults = []
        self.locked = {}
        self._refuses = refuses
        self._copying = Queue(self)
        self._computing = Queue(self) if queued else HostQueue(self)
        self._reading = []  # host memory of copies that are to come: address and end

    @property
    def copying(self):
        return self._copying

    @property
    def computing(self):
        return self._computing

    def compute(self, operation):
        """Have the device do something in the stream that computes."""
        self._computing.put(operation)

    @contextmanager
    def compute_is_busy(self):
        """The stream that computes is at something that does not end, from the time it gets there
        until the end of the context.
        """
        ends = Place(self)
        ends.marks = 1
        self._computing.put(lambda: None, ends)
        yield
        ends.reached = 1

    def go_on(self):
        """Let the device do what it can."""
        with self.lock_:
            while self._step():
                pass

    def beside(self):
        """Itself: what may come in any order may also come in this one."""
        return self

    def copy(self, target, source):
        self.num_copies += 1
        assert target.nbytes == source.nbytes
        begin, end = source.data_ptr(), source.data_ptr() + source.nbytes
        if not any(a <= begin and end <= a + size for a, size in self.locked.items()):
            staged = source.clone()  # what is not locked is copied by the host first
            self._copying.put(lambda: target.copy_(staged))
            return
        self._reading.append((begin, end))
        middle = target.numel() // 2

        def first():
            if not self.faults:
                target[:middle] = _bytes_at(begin, middle)

        def second():
            if not self.faults:
                target[middle:] = _bytes_at(begin + middle, target.numel() - middle)
            self._reading.remove((begin, end))

        self._copying.put(first)
        self._copying.put(second)

    def event(self, *, timed=False):
        return Place(self)

    def device_buffer(self, num_bytes):
        """Others had it before, and their operators are still at work in it."""
        buffer = torch.full((num_bytes,), 255, dtype=torch.uint8)
        for value in (254, 253):
            self.compute(lambda value=value: buffer.fill_(value))
        return buffer

    def lock(self, address, num_bytes):
        if self._refuses:
            return "out of memory"
        if any(a < address + num_bytes and address < a + size for a, size in self.locked.items()):
            self.faults.append("locked twice")
        self.locked[address] = num_bytes
        return None

    def unlock(self, address):
        end = address + self.locked.pop(address)
        if any(address < stop and start < end for start, stop in self._reading):
            self.faults.append("host memory goes while it is copied")

    def progress(self):
        """Let the device do something, or nothing."""
        with self.lock_:
            for _ in range(self._choices.randint(0, self._most_steps)):
                if not self._step():
                    return

    def run_until(self, event):
        """Let the device go on at least to an event."""
        with self.lock_:
            while not event.done:
                assert self._step(), "the device waits for ever"

    def finish(self):
        """Let it do all that it was asked, and say what went wrong."""
        self.go_on()
        assert not self._copying.todo, "the device waits for ever"
        assert not self.faults, self.faults

    def _step(self):
        able = [queue for queue in (self._copying, self._computing) if queue.can_go_on]
        if len(able) == 2:
            able = able[self._choices.random() >= self._copies_first :]
        if able:
            able[0].step()
        return bool(able)


def _bytes_at(address, num_bytes):
    if num_bytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    memory = (ctypes.c_ubyte * num_bytes).from_address(address)
    return torch.frombuffer(memory, dtype=torch.uint8)
