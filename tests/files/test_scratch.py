"""Files of one process: owned while it lives, removed by the next where it was killed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ollm_core.files import scratch
from ollm_core.files.scratch import (
    leftovers,
    make_directory,
    make_file,
    reap,
    replace_file,
    take_over,
)

MAKE = """
import sys, os, signal
from pathlib import Path
from ollm_core.files.scratch import make_directory, make_file
for make in (make_file, make_directory):
    make(Path(sys.argv[1]), "new-", ".x")
os.kill(os.getpid(), signal.SIGKILL)
"""


def removed(path: Path) -> None:
    """Either kind."""
    path.rmdir() if path.is_dir() else path.unlink()


def test_what_a_killed_process_left_is_removed(tmp_path: Path):
    """And nothing else: neither what a process has, nor what only looks like it."""
    subprocess.run([sys.executable, "-c", MAKE, str(tmp_path)], check=False)
    left = set(tmp_path.iterdir())
    assert len(left) == 2
    mine = [make(tmp_path, "new-", ".x") for make in (make_file, make_directory)]
    (tmp_path / "new-abcdefgh.x").write_text("anybody may read it")
    (tmp_path / "new-link1234.x").symlink_to(tmp_path)
    (tmp_path / "new-other.x").touch(0o600)
    others = set(tmp_path.iterdir()) - left
    reap(leftovers(tmp_path, "new-", ".x"), removed)
    assert set(tmp_path.iterdir()) == others
    for one in mine:
        os.close(one.descriptor)
    reap(leftovers(tmp_path, "new-", ".x"), removed)
    assert set(tmp_path.iterdir()) == others - {one.path for one in mine}


@pytest.mark.parametrize("make", [make_file, make_directory])
@pytest.mark.parametrize("is_kept", [True, False], ids=["looked at", "removed"])
def test_one_that_is_reaped_before_it_is_locked(tmp_path: Path, monkeypatch, make, is_kept: bool):
    """Another process may take it for a leftover in that moment; then there is another one."""
    lock, taken = scratch._lock, []

    def interfere(descriptor: int) -> bool:
        if not taken:
            (path,) = tmp_path.iterdir()
            taken.append(None)
            taken.append(take_over(path))
            if not is_kept:
                removed(path)
        return lock(descriptor)

    monkeypatch.setattr(scratch, "_lock", interfere)
    made = make(tmp_path, "new-")
    assert made.locked
    assert made.path.exists()
    assert (len(list(tmp_path.iterdir())) == 2) == is_kept
    assert take_over(made.path) is None
    os.close(made.descriptor)
    os.close(taken[1])


def test_without_locks_nothing_is_removed(tmp_path: Path, monkeypatch):
    """Some file systems have none: nobody could tell what is in use."""
    monkeypatch.setattr("fcntl.flock", lambda *_: (_ for _ in ()).throw(OSError(95, "no locks")))
    made = make_directory(tmp_path, "new-")
    assert not made.locked
    os.close(made.descriptor)
    reap(leftovers(tmp_path, "new-"), shutil.rmtree)
    assert made.path.is_dir()


def test_a_file_is_replaced_at_once_or_not_at_all(tmp_path: Path, monkeypatch):
    """A failed write leaves what was there; what a killed one left goes with the next."""
    path = tmp_path / "rates.json"
    replace_file(path, b"one")
    left = make_file(tmp_path, ".rates.json.", ".partial")
    os.close(left.descriptor)

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.write", full)
        with pytest.raises(OSError, match="No space"):
            replace_file(path, b"two")
    assert [one.name for one in tmp_path.iterdir()] == ["rates.json"]
    assert path.read_bytes() == b"one"
    replace_file(path, b"two")
    assert path.read_bytes() == b"two"
