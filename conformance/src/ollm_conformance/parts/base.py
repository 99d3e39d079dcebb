"""What the suites of all parts have in common."""

from __future__ import annotations

import os
import random
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

from ollm_conformance.compare import refused
from ollm_conformance.seeds import run_seed


class PartSuite:
    """Base of the suites of parts."""

    part: ClassVar[str] = ""
    """The name that results carry; default: that of the test class, without `Test`."""
    expected_failures: ClassVar[Mapping[str, str]] = {}
    """Check id to the reason why it fails. One that passes after all is a failure."""

    @classmethod
    def subject_name(cls, config: pytest.Config) -> str:
        """The name that results carry."""
        return cls.part or cls.__name__.removeprefix("Test")


def examples(number: int, num_steps: int = 20) -> settings:
    """Hypothesis tries `number` examples, the same ones for the same seed, and writes no files."""
    return settings(
        max_examples=number,
        stateful_step_count=num_steps,
        derandomize=not run_seed(),  # the plugin gives Hypothesis any other seed,
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )


def refusal(kind: type[Exception], request: Callable[[], object], what: str) -> str:
    """The one line with which `request` is refused. Raises AssertionError unless it is one of
    `kind`.
    """
    with refused(kind, what) as refusing:
        request()
    line = str(refusing.error)
    assert "\n" not in line, f"{what}: expected one line, got {line}"
    return line


class GoesThrough:
    """A context manager for a block that raises an error in the part's hands, as Ctrl-C would:
    raises AssertionError unless that very error leaves the block.
    """

    def __init__(self, error: BaseException, what: str) -> None:
        self._error = error
        self._what = what

    def __enter__(self) -> None:
        """Nothing to do."""

    def __exit__(self, kind: object, found: BaseException | None, traceback: object) -> bool:
        if found is not self._error:
            got = "no error" if found is None else repr(found)
            raise AssertionError(
                f"{self._what}: expected {self._error!r} to go on, got {got}"
            ) from found
        return True


def open_files() -> dict[int, str]:
    """What the process has open: descriptor to what it is, pipes and the like included."""
    found = {}
    for number in os.listdir("/proc/self/fd"):
        path = Path("/proc/self/fd", number)
        if path.is_symlink():  # the descriptor that lists the directory is gone by now
            found[int(number)] = os.readlink(path)
    return found


def maps_of(directory: Path) -> list[str]:
    """Files of `directory` that are mapped into memory."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sorted({line.split(maxsplit=5)[-1] for line in lines if str(directory) in line})


@contextmanager
def nothing_left(directory: Path) -> Iterator[None]:
    """Raises AssertionError if after the block more is open, mapped or running than before it."""
    files, threads = open_files(), set(threading.enumerate())
    yield
    opened = [path for number, path in open_files().items() if files.get(number) != path]
    assert not opened, f"expected no open file afterwards, got {', '.join(opened)}"
    mapped = maps_of(directory)
    assert not mapped, f"expected no mapped file afterwards, got {', '.join(mapped)}"
    running = [thread.name for thread in threading.enumerate() if thread not in threads]
    assert not running, f"expected no thread afterwards, got {', '.join(running)}"


def _process_state() -> dict[str, object]:
    """What belongs to the whole process, by what it is called."""
    return {
        "torch's number of threads": torch.get_num_threads(),
        "torch's random numbers": torch.get_rng_state().tolist(),
        "Python's random numbers": random.getstate(),
        "torch's default dtype": torch.get_default_dtype(),
        "torch's mode of gradients": torch.is_grad_enabled(),
        "torch's deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "environment": dict(os.environ),
        "working directory": os.getcwd(),
    }


@contextmanager
def process_as_it_was(what: str) -> Iterator[None]:
    """Raises AssertionError if the block changes what all in the process share. What was set to the
    same in an earlier block shows too: threads and random numbers are others here.
    """
    num_threads, gradients = torch.get_num_threads(), torch.is_grad_enabled()
    torch.set_num_threads(num_threads + 2)
    torch.rand(1)
    random.random()
    try:
        before = _process_state()
        yield
        after = _process_state()
    finally:
        torch.set_num_threads(num_threads)
        torch.set_grad_enabled(gradients)
    changed = [name for name, value in before.items() if after[name] != value]
    assert not changed, f"{what}: expected {', '.join(changed)} as before, got others"


@contextmanager
def switching_often() -> Iterator[None]:
    """Let threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


@contextmanager
def unreadable(numbers: Iterable[int]) -> Iterator[None]:
    """Put a file that can only be written in the place of each descriptor."""
    saved = {number: os.dup(number) for number in numbers}
    writable = os.open(os.devnull, os.O_WRONLY)
    try:
        for number in numbers:
            os.dup2(writable, number)
        yield
    finally:
        for number, copy in saved.items():
            os.dup2(copy, number, inheritable=False)
            os.close(copy)
        os.close(writable)


def fills_memory(directory: Path) -> bool:
    """Whether files of `directory` are kept in memory, so that a large one would fill it."""
    device = directory.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, rest = line.partition(" - ")
        if fields.split()[2] == number:
            return rest.split()[0] in ("tmpfs", "ramfs")
    return False
