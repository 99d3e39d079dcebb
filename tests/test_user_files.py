"""Where files of the user lie."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from ollm_core.user_files import absolute, cache_directory


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


def test_without_a_home_the_cache_is_temporary(nobody: None):
    """Of this user alone."""
    assert cache_directory() == Path(tempfile.gettempdir()) / f"ollm-{os.getuid()}"


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
