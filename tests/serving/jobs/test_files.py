"""Files of a batch: lines of any form, a torn last one, locks, and disks that say no."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ollm_core.errors import InputError, OllmError
from ollm_core.serving.jobs import files as job_files
from ollm_core.serving.jobs.files import AnswerFile, InputFile

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.binary(max_size=40).map(lambda one: one.replace(b"\n", b"")), max_size=8),
    st.booleans(),
    st.integers(1, 30),
)
@example([BYTE_ORDER_MARK, BYTE_ORDER_MARK + b"x"], False, 1)
def test_lines_are_those_of_the_file(tmp_path, monkeypatch, lines, is_whole, piece):
    """However it is cut into pieces; blank ones are left out, and long ones told of."""
    path = tmp_path / "in"
    path.write_bytes(b"\n".join(lines) + b"\n" * is_whole)
    with monkeypatch.context() as patched, InputFile(path) as file:
        patched.setattr(job_files, "_READ_BYTES", piece)
        patched.setattr(job_files, "MAX_LINE_BYTES", 25)
        found = {line.number: line.content for line in file.lines()}
        digest = file.digest
        patched.setattr(job_files, "_READ_BYTES", 1 << 20)
        list(file.lines())
        assert file.digest == digest
    shown = {n: one if len(one) <= 25 else None for n, one in enumerate(lines, 1)}
    if shown.get(1) is not None:
        shown[1] = shown[1].removeprefix(BYTE_ORDER_MARK)
    assert found == {n: one for n, one in shown.items() if one is None or one.strip()}


def test_a_byte_order_mark_is_no_part_of_a_row(tmp_path):
    """As editors on Windows write one."""
    (tmp_path / "in").write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n')
    with InputFile(tmp_path / "in") as file:
        [line] = file.lines()
    assert json.loads(line.content) == {"a": 1}


def answer(name):
    """A line."""
    return {"custom_id": name, "text": "é" * 9}


@pytest.mark.parametrize("torn", [b"", b'{"cus', b"\0" * 5000, b"x" * (2 << 20)])
def test_a_torn_last_line_is_cut_off(tmp_path, torn):
    """And nothing else; the next line follows the last whole one."""
    path = tmp_path / "out"
    with AnswerFile(path) as file:
        file.append(answer("a"))
        file.append(answer("b"))
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    with AnswerFile(path) as file:
        assert [one["custom_id"] for one in file.answers()] == ["a", "b"]
        assert path.read_bytes() == whole + torn
        file.mend()
        assert path.read_bytes() == whole
        file.append(answer("c"))
    assert [json.loads(one) for one in path.read_text().splitlines()] == list(map(answer, "abc"))


@pytest.mark.parametrize("line", ["{}", "text", "[1]", '{"custom_id": 3}', ""])
def test_another_file_is_refused_as_it_is(tmp_path, line):
    """A file of something else is not cut."""
    path = tmp_path / "out"
    path.write_text(f"{json.dumps(answer('a'))}\n{line}\nno end")
    before = path.read_bytes()
    with AnswerFile(path) as file, pytest.raises(InputError, match="line 2 is not an answer"):
        list(file.answers())
    assert path.read_bytes() == before


def test_two_cannot_write_one_file(tmp_path):
    """The second is told at once, and the lock goes with its process."""
    path = tmp_path / "out"
    with AnswerFile(path), pytest.raises(InputError, match="another run is writing there"):
        AnswerFile(path)
    AnswerFile(path).close()


def test_a_file_that_another_run_removes_is_made_again(tmp_path, monkeypatch):
    """The lock of a file that has no name any more would keep nobody away."""
    path, once = tmp_path / "out", iter([True])
    lock = AnswerFile._lock

    def lock_late(self):
        if next(once, False):
            path.unlink()
        lock(self)

    monkeypatch.setattr(AnswerFile, "_lock", lock_late)
    with AnswerFile(path) as file:
        file.append(answer("a"))
    assert path.read_text()


@pytest.mark.parametrize("kind", ["directory", "pipe", "nowhere", "device"])
def test_what_is_no_file_is_refused(tmp_path, kind):
    """In one line, at once, for reading and for writing."""
    path = tmp_path / "it"
    if kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path = type(path)("/dev/null")
    else:
        path = tmp_path / "no" / "such"
    for opening in (InputFile, AnswerFile):
        with pytest.raises(InputError, match=r"cannot|is not a regular file"):
            opening(path)


def test_a_full_disk_leaves_whole_lines(tmp_path):
    """A real limit of the system in a process of its own: what did not fit is not there."""
    program = (
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "from ollm_core.serving.jobs.files import AnswerFile\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (250, 250))\n"
        "file = AnswerFile(Path(sys.argv[1]))\n"
        "try:\n"
        "    for n in range(9): file.append({'custom_id': str(n), 'text': 'x' * 60})\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    path = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-c", program, path], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(f"OllmError cannot write to {path}: File too large")
    assert "the same command goes on" in done.stdout
    lines = path.read_text().splitlines(keepends=True)
    assert [json.loads(line)["custom_id"] for line in lines] == ["0", "1"]
    assert path.read_text().endswith("\n")


def test_a_failed_sync_is_told(tmp_path, monkeypatch):
    """The line is taken back: the disk may not have it."""

    def fail(_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with AnswerFile(tmp_path / "out") as file:
        file.append(answer("a"))
        before = file.path.read_bytes()
        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", fail)
            with pytest.raises(OllmError, match="Input/output error"):
                file.append(answer("b"))
        assert file.path.read_bytes() == before


def test_an_interrupt_leaves_whole_lines(tmp_path, monkeypatch):
    """Ctrl-C while a line is written takes it back; one that waits for the disk stays."""

    def interrupt(*_):
        raise KeyboardInterrupt

    write = os.write
    with AnswerFile(tmp_path / "out") as file:
        for name, broken in (("write", lambda one, text: write(one, text[:5]) and interrupt()),
                             ("fsync", interrupt)):  # fmt: skip
            with monkeypatch.context() as patched:
                patched.setattr(os, name, broken)
                with pytest.raises(KeyboardInterrupt):
                    file.append(answer(name))
        file.append(answer("last"))
        assert [one["custom_id"] for one in file.answers()] == ["fsync", "last"]


def test_a_removed_file_is_told(tmp_path):
    """Nothing is written where nobody would find it."""
    with AnswerFile(tmp_path / "out") as file:
        file.append(answer("a"))
        file.path.unlink()
        with pytest.raises(OllmError, match="was removed while it was written"):
            file.append(answer("b"))


def test_every_line_is_synced_before_the_next(tmp_path, monkeypatch):
    """One fsync for each."""
    synced = []
    with AnswerFile(tmp_path / "out") as file:
        monkeypatch.setattr(os, "fsync", lambda one: synced.append(os.fstat(one).st_size))
        sizes = []
        for name in "abc":
            file.append(answer(name))
            sizes.append(file.state.st_size)
    assert synced == sizes
