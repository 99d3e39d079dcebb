"""Files of clients: by ids that the server makes, in a directory of its own."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from ollm_core.errors import InputError
from ollm_core.server.errors import RefusedRequestError
from ollm_core.server.file_store import FileStore, file_record, new_id


@pytest.fixture
def store(tmp_path: Path):
    """Of a directory that is not there yet."""
    with FileStore(tmp_path / "a/files", 1000) as opened:
        yield opened


def add(store: FileStore, data: bytes) -> str:
    """A file, and its record."""
    file_id = new_id("file")
    with store.create(file_id) as file:
        file.write(data)
    store.write(file_record(file_id, "batch", "../../etc/passwd", len(data)))
    return file_id


@pytest.mark.parametrize(
    "name",
    ["../x", "/etc/passwd", "file-", "file-../../../../../etc/pa", "lock", "", "file-" + "g" * 24,
     "file-" + "a" * 23 + "\n", "file-" + "a" * 24 + ".json", "a\0b"],
)  # fmt: skip
def test_what_is_no_id_is_no_file(store: FileStore, name: str):
    """It never comes to a path."""
    for use in (store.content, lambda one: store.read(one, "file"), store.remove, store.create):
        with pytest.raises(RefusedRequestError) as refused:
            use(name)
        assert refused.value.status == 404


def test_files_are_this_users_alone(store: FileStore):
    """And so is the directory."""
    path = store.content(add(store, b"x"))
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert stat.S_IMODE(os.stat(path.with_name(f"{path.name}.json")).st_mode) == 0o600
    assert stat.S_IMODE(os.stat(store.directory).st_mode) == 0o700


def test_records_are_listed_and_removed(store: FileStore):
    """The newest first; a client's name is data."""
    first, second = add(store, b"abc"), add(store, b"defg")
    store.write({**store.read(second, "file"), "created_at": 2_000_000_000_0})
    assert [one["id"] for one in store.records("file")] == [second, first]
    assert store.read(first, "file")["filename"] == "../../etc/passwd"
    store.remove(first)
    assert not store.content(first).exists()
    with pytest.raises(RefusedRequestError):
        store.read(first, "file")


def test_a_damaged_record_is_none(store: FileStore):
    """And hides no other."""
    good, bad = add(store, b"x"), add(store, b"y")
    store.content(bad).with_name(f"{bad}.json").write_bytes(b"{")
    assert [one["id"] for one in store.records("file")] == [good]


def test_room_is_what_the_budget_leaves(store: FileStore):
    """Never less than nothing."""
    before = store.room
    add(store, b"x" * 300)
    assert before - store.room >= 300
    add(store, b"x" * 900)
    assert store.room == 0


def test_one_server_at_a_time(store: FileStore):
    """The second is told; after the first has ended it may."""
    with pytest.raises(InputError, match="is used by another server"):
        FileStore(store.directory, 1)
    store.close()
    store.close()
    FileStore(store.directory, 1).close()


def test_a_directory_that_cannot_be_is_one_line(tmp_path: Path):
    """A file is in its place."""
    (tmp_path / "x").write_text("")
    with pytest.raises(InputError, match="cannot use"):
        FileStore(tmp_path / "x", 1)
