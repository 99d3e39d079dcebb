"""Who reads in a home is known to its owner, whatever becomes of either."""

import os
import subprocess
import sys

import pytest

from ollm_core import KVStoreError
from ollm_core.kv.disk.readers import NAME, are_there, enter

READER = """
import sys, time
from pathlib import Path
from ollm_core.kv.disk.readers import enter
assert enter(Path({home!r})) is not None
print("in", flush=True)
time.sleep(60)
"""


def test_readers_come_and_go(tmp_path):
    """Any number at once; nobody is there before the first and after the last."""
    assert not are_there(tmp_path)
    assert list(tmp_path.iterdir()) == []
    one, other = enter(tmp_path), enter(tmp_path)
    assert one is not None
    assert other is not None
    assert are_there(tmp_path)
    os.close(one)
    assert are_there(tmp_path)
    os.close(other)
    assert not are_there(tmp_path)
    assert enter(tmp_path) is not None


def test_a_killed_reader_is_there_no_more(tmp_path):
    """A process of its own."""
    code = READER.format(home=str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as one:
        assert one.stdout.readline() == "in\n"
        assert are_there(tmp_path)
        one.kill()
        one.wait()
    assert not are_there(tmp_path)


def test_asking_keeps_nobody_out(tmp_path):
    """Who enters while somebody asks waits for it."""
    os.close(enter(tmp_path))
    asking = subprocess.Popen(
        [
            sys.executable, "-c",
            "import sys; from pathlib import Path; from ollm_core.kv.disk.readers import *\n"
            "while True: are_there(Path(sys.argv[1]))", str(tmp_path),
        ]
    )  # fmt: skip
    try:
        for _ in range(2000):
            entered = enter(tmp_path)
            assert entered is not None
            os.close(entered)
    finally:
        asking.kill()
        asking.wait()


@pytest.mark.parametrize("what", ["link", "directory", "pipe"])
def test_what_is_not_a_file_of_ours(tmp_path, what):
    """Nobody enters by it, and an owner takes no chance. It stays as it is."""
    path = tmp_path / NAME
    other = tmp_path / "other"
    other.write_text("mine")
    if what == "link":
        path.symlink_to(other)
    elif what == "directory":
        path.mkdir()
    else:
        os.mkfifo(path)
    with pytest.raises((OSError, KVStoreError)):
        enter(tmp_path)
    assert are_there(tmp_path)
    assert other.read_text() == "mine"


def test_a_home_that_is_gone(tmp_path):
    """Is entered by nobody."""
    with pytest.raises(FileNotFoundError):
        enter(tmp_path / "gone")
    assert not are_there(tmp_path / "gone")
