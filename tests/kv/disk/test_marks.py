"""When a prefix was used, and whether it is pinned: files beside its journal."""

import os
import time

import pytest

from ollm_core import KVStoreError
from ollm_core.kv.disk.marks import forget, is_pinned, mark_used, pin, read_marks, unpin

KEY, OTHER = bytes(range(16)), bytes(16)


def test_marks_are_set_and_forgotten(tmp_path):
    """Each by itself; setting one twice is as once."""
    mark_used(tmp_path, KEY)
    pin(tmp_path, OTHER)
    pin(tmp_path, OTHER)
    marks = read_marks(tmp_path)
    assert abs(marks.used.pop(KEY.hex()) - time.time()) < 60
    assert (marks.used, marks.pinned) == ({}, {OTHER.hex()})
    assert is_pinned(tmp_path, OTHER)
    assert not is_pinned(tmp_path, KEY)
    unpin(tmp_path, OTHER)
    unpin(tmp_path, OTHER)
    forget(tmp_path, KEY)
    assert read_marks(tmp_path) == read_marks(tmp_path / "gone")
    assert list(tmp_path.iterdir()) == []


def test_a_mark_is_renewed(tmp_path):
    """By each use."""
    mark_used(tmp_path, KEY)
    (path,) = tmp_path.iterdir()
    os.utime(path, (5, 5))
    assert read_marks(tmp_path).used == {KEY.hex(): 5}
    mark_used(tmp_path, KEY)
    assert read_marks(tmp_path).used[KEY.hex()] > 1_000_000


def test_links_are_not_followed(tmp_path):
    """A mark that is a link is none, and what it leads to stays as it is."""
    target = tmp_path / "target"
    target.write_text("mine")
    os.utime(target, (5, 5))
    for kind in ("used", "pinned"):
        (tmp_path / f"prefixes.{KEY.hex()}.{kind}").symlink_to(target)
    mark_used(tmp_path, KEY)
    with pytest.raises((OSError, KVStoreError)):
        pin(tmp_path, KEY)
    assert target.stat().st_mtime == 5
    assert not is_pinned(tmp_path, KEY)
    marks = read_marks(tmp_path)
    assert (marks.used, marks.pinned) == ({}, set())


def test_where_nothing_can_be_written(tmp_path):
    """A use that cannot be marked is not; a pin that cannot be set is told."""
    mark_used(tmp_path / "gone", KEY)
    with pytest.raises(FileNotFoundError):
        pin(tmp_path / "gone", KEY)
