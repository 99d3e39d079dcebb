"""What a model is: every byte counts, and what is remembered of it is believed only where it must
be right.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time

import pytest
import torch
from safetensors.torch import save_file

from ollm_core import ReadError
from ollm_core.checkpoint.safetensors import SINGLE_FILE, open_checkpoint
from ollm_core.model.fingerprint import FileHashes, identity

LARGE = 9 << 20  # bytes: three pieces


def later():
    """A clock by which every file here has been left alone for long."""
    return time.time_ns() + 10**10


@pytest.fixture
def place(tmp_path):
    """Where hashes are kept: it is not there yet."""
    return tmp_path / "cache" / "hashes.json"


@pytest.fixture
def model(tmp_path):
    """A checkpoint of two small tensors."""
    directory = tmp_path / "model"
    directory.mkdir()
    save_file({"a": torch.arange(5000.0), "b": torch.ones(7)}, directory / SINGLE_FILE)
    return directory


def hashed(directory, place, clock=later):
    """The identity, and whether anything had to be read for it."""
    seen = []
    hashes = FileHashes(place, least_bytes=0, clock=clock)
    found = identity(open_checkpoint(directory), {}, lambda *step: seen.append(step), hashes)
    return found, bool(seen)


def write_at(path, offset, data):
    """Write in place, when the clock has ticked, and set the modification time back."""
    status = path.stat()
    while path.stat().st_ctime_ns == status.st_ctime_ns:
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(data)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_it_follows_names_shapes_and_config(tmp_path):
    """Another shape, name or config is another model; the same bytes elsewhere are not."""
    seen = set()
    for i, (tensors, config) in enumerate(
        [({"a": (2,)}, {}), ({"b": (2,)}, {}), ({"a": (3,)}, {}), ({"a": (2,)}, {"rope": 1})]
    ):
        for copy in ("first", "second"):
            directory = tmp_path / f"{i}{copy}"
            directory.mkdir()
            save_file({k: torch.zeros(v) for k, v in tensors.items()}, directory / SINGLE_FILE)
            seen.add(identity(open_checkpoint(directory), config))
        assert len(seen) == i + 1
    assert all(len(found) == 64 for found in seen)


def test_it_follows_every_byte(tmp_path):
    """One bit at either end, in the middle, or where two pieces meet, makes another model."""
    seen = set()
    save_file({"a": torch.zeros(LARGE, dtype=torch.uint8)}, tmp_path / SINGLE_FILE)
    path = tmp_path / SINGLE_FILE
    size = path.stat().st_size
    start = size - LARGE
    places = [start, size // 2, (4 << 20) - 1, 4 << 20, (8 << 20) - 1, 8 << 20, size - 1]
    seen.add(identity(open_checkpoint(tmp_path), {}))
    for offset in places:
        write_at(path, offset, b"\1")
        seen.add(identity(open_checkpoint(tmp_path), {}))
        write_at(path, offset, b"\0")
    assert len(seen) == len(places) + 1
    assert identity(open_checkpoint(tmp_path), {}) in seen


def test_shards_count_in_the_order_of_their_names(tmp_path):
    """Two shards whose contents change places are another model."""
    seen = set()
    for names in (("one", "two"), ("two", "one")):
        directory = tmp_path / names[0]
        directory.mkdir()
        for i, name in enumerate(names):
            save_file({f"t{i}": torch.full((9,), float(i))}, directory / f"{name}.safetensors")
        weight_map = {f"t{i}": f"{name}.safetensors" for i, name in enumerate(names)}
        index = directory / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}))
        seen.add(identity(open_checkpoint(directory), {}))
    assert len(seen) == 2


def test_it_is_computed_once(model, place):
    """The next process finds it, also by a link; it is readable by this user alone."""
    first, read = hashed(model, place)
    assert read
    assert hashed(model, place) == (first, False)
    link = model.with_name("link")
    link.symlink_to(model)
    assert hashed(link, place) == (first, False)
    assert place.parent.stat().st_mode & 0o777 == 0o700
    assert place.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in place.parent.iterdir()] == [place.name]


def test_a_changed_file_is_another_one(model, place):
    """Written in place with its old time, or replaced by one of equal size and time: read again."""
    path = model / SINGLE_FILE
    raw, status = path.read_bytes(), path.stat()
    first, _ = hashed(model, place)
    write_at(path, status.st_size // 2, b"\1\2")
    second, read = hashed(model, place)
    assert read
    assert second != first
    (model / "new").write_bytes(raw)
    os.utime(model / "new", ns=(status.st_atime_ns, status.st_mtime_ns))
    (model / "new").replace(path)
    assert hashed(model, place) == (first, True)
    assert hashed(model, place) == (first, False)


def test_a_file_just_written_is_not_remembered(model, place):
    """Another write within the same tick of the clock would not show; nor is a small file."""
    assert hashed(model, place, time.time_ns)[1]
    assert hashed(model, place, time.time_ns)[1]
    assert not place.exists()
    hashes = FileHashes(place, clock=later)
    identity(open_checkpoint(model), {}, None, hashes)
    assert not place.exists()


def test_a_file_that_changes_meanwhile_is_refused(model, place):
    """Not as it was opened: a ReadError, and nothing is remembered."""
    hashes = FileHashes(place, least_bytes=0, clock=later)
    checkpoint = open_checkpoint(model)

    def touch(done, total):
        if done == total:
            write_at(model / SINGLE_FILE, 100, b"x")

    with pytest.raises(ReadError, match="changed while the model was open"):
        identity(checkpoint, {}, touch, hashes)
    with pytest.raises(ReadError, match="changed while the model was open"):
        identity(checkpoint, {}, None, hashes)
    (model / SINGLE_FILE).unlink()
    with pytest.raises(ReadError, match=r"model\.safetensors"):
        identity(checkpoint, {}, None, hashes)
    assert not place.exists()


def other_owner(path):
    os.chown(path, 1, -1)


def as_link(path):
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def as_pipe(path):
    path.unlink()
    os.mkfifo(path)


def padded(path):
    path.write_bytes(path.read_bytes() + b" " * (1 << 20))


root = pytest.mark.skipif(os.geteuid() != 0, reason="needs a file of another user")
NOT_BELIEVED = {
    "another user's": (other_owner, root),
    "writable by others": (lambda path: path.chmod(0o620), ()),
    "in a directory that others may write": (lambda path: path.parent.chmod(0o777), ()),
    "a link": (as_link, ()),
    "a pipe": (as_pipe, ()),
    "too large": (padded, ()),
    "no JSON": (lambda path: path.write_bytes(b"\xff{"), ()),
    "nested": (lambda path: path.write_text('{"a":' + "[" * 100_000), ()),
    "a list": (lambda path: path.write_text("[]"), ()),
    "no digests": (lambda path: path.write_text(path.read_text().replace(': "', ': "-')), ()),
    "numbers": (lambda path: path.write_text(json.dumps(dict.fromkeys(read_keys(path), 1))), ()),
}


def read_keys(path):
    return json.loads(path.read_text())


@pytest.mark.parametrize(
    "change", [pytest.param(c, marks=m, id=name) for name, (c, m) in NOT_BELIEVED.items()]
)
def test_what_others_may_have_written_is_not_believed(model, place, change):
    """Hashes in a file that is not this user's alone, or is no such file, are computed again."""
    first, _ = hashed(model, place)
    change(place)
    assert hashed(model, place) == (first, True)


def test_without_a_place_it_goes_on(model, tmp_path, caplog):
    """Where nothing can be written it says so in one line, and hashes again the next time."""
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING, "ollm"):
        first = hashed(model, tmp_path / "file" / "below" / "hashes.json")
        assert [record.message for record in caplog.records] == [
            f"{tmp_path}/file/below: hashes cannot be kept there: Not a directory"
        ]
        assert hashed(model, tmp_path / "file" / "below" / "hashes.json") == first


def test_the_oldest_are_forgotten(model, place):
    """The file does not grow without end, and a new entry has its place in it."""
    place.parent.mkdir(mode=0o700)
    place.write_text(json.dumps({f"{i:064x}": "0" * 64 for i in range(4096)}))
    first, _ = hashed(model, place)
    assert hashed(model, place) == (first, False)
    left = list(json.loads(place.read_text()))
    assert len(left) == 4096
    assert left[0] == f"{1:064x}"


def test_progress_and_interruption(tmp_path):
    """Progress goes from nothing to all bytes; Ctrl-C ends it at once and leaves no thread."""
    save_file({"a": torch.zeros(LARGE, dtype=torch.uint8)}, tmp_path / SINGLE_FILE)
    size = (tmp_path / SINGLE_FILE).stat().st_size
    seen = []
    identity(open_checkpoint(tmp_path), {}, lambda *step: seen.append(step))
    assert seen == [(min(i << 22, size), size) for i in range(4)]

    def interrupt(done, total):
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        identity(open_checkpoint(tmp_path), {}, interrupt)
    assert not [t for t in threading.enumerate() if t.name.startswith("ollm-hash")]
