"""Where files of the user lie."""

from __future__ import annotations

import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ollm_core import InputError
from ollm_core.files.paths import (
    absolute,
    cache_directory,
    check_writable_directory,
    check_writable_file,
)


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch):
    """A user id without HOME and without an entry in the password database, as in a container."""

    def no_entry(_: int):
        raise KeyError

    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", no_entry)


def test_the_cache_is_below_home(monkeypatch: pytest.MonkeyPatch):
    """By HOME."""
    monkeypatch.setenv("HOME", "/home/u")
    assert cache_directory() == Path("/home/u/.cache/ollm")


def test_without_a_home_the_cache_is_temporary(
    nobody: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """Of this user alone: who has made it before, or opened it to others, is not trusted."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    found = cache_directory()
    assert found == tmp_path / f"ollm-{os.getuid()}"
    assert found.stat().st_mode & 0o777 == 0o700
    assert cache_directory() == found
    found.chmod(0o755)
    with pytest.raises(InputError, match=r"not a private directory of this user. hint: set HOME"):
        cache_directory()
    found.rmdir()
    found.symlink_to(tmp_path)
    with pytest.raises(InputError, match="not a private directory"):
        cache_directory()


def test_paths_hold_after_a_change_of_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Relative ones, `~` and `..` are made absolute at once."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/u")
    assert absolute("a/../b") == tmp_path / "b"
    assert absolute("~/kv") == Path("/home/u/kv")


def test_a_tilde_without_a_home_is_a_name(
    nobody: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """There is nothing that it could stand for."""
    monkeypatch.chdir(tmp_path)
    assert absolute("~/kv") == tmp_path / "~/kv"


def test_a_current_directory_that_is_gone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Only absolute paths have a meaning then."""
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert absolute("/x") == Path("/x")
    with pytest.raises(InputError, match="x is not a path: the current directory is gone"):
        absolute("x")


def test_what_can_be_written_is_left_as_it_was(tmp_path: Path):
    """A new name, one that is there, and directories that are not there yet."""
    there = tmp_path / "there"
    there.write_text("text")
    for file in (there, tmp_path / "new", Path("/dev/null")):
        check_writable_file(file)
    for directory in (tmp_path, tmp_path / "a" / "b"):
        check_writable_directory(directory)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    assert there.read_text() == "text"


@pytest.mark.parametrize("check", [check_writable_directory, check_writable_file])
@pytest.mark.parametrize("name", ["there/x", "n" * 300, "/proc/x", "loop/x"])
def test_what_cannot_be_written_is_one_line(tmp_path: Path, check, name: str):
    """With the reason of the system."""
    (tmp_path / "there").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(InputError, match="cannot write to /") as refused:
        check(tmp_path / name)
    assert "\n" not in str(refused.value)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_file_is_no_directory_and_a_directory_no_file(tmp_path: Path):
    """Either is refused by what it is."""
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="it is not a directory"):
        check_writable_directory(tmp_path / "file")
    with pytest.raises(InputError, match="Is a directory"):
        check_writable_file(tmp_path)


def test_many_look_at_a_new_directory_at_once(tmp_path: Path):
    """Each finds that it can be written, whatever the others remove of it."""
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(check_writable_directory, [tmp_path / "a" / "b"] * 100))
    assert not [path for path in tmp_path.rglob("*") if path.name not in ("a", "b")]
