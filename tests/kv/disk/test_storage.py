"""The KV store on disk: the contract, files of the user alone, and disks that fail."""

from __future__ import annotations

import fcntl
import json
import os
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from kv_content import content, geometry_of, random_keys

from ollm_conformance import KVStoreConformance
from ollm_core import DoesNotFitError, KVStoreError, ReadError
from ollm_core.contracts.kv import KVGeometry
from ollm_core.kv.disk.layer_file import MAGIC
from ollm_core.kv.disk.storage import DiskKVStore
from ollm_core.memory.accounts import MemoryAccount

GEOMETRY = KVGeometry.uniform(2, 3, 5, torch.float32, torch.device("cpu"), block_size=4)


def open_store(directory, limit=10**8):
    """A store on disk and the account it charges."""
    account = MemoryAccount("memory", limit)
    return DiskKVStore(GEOMETRY, account, Path(directory), "f00d"), account


class TestDiskStore(KVStoreConformance):
    """Keys and values on disk."""

    @classmethod
    def open_store(cls, shape, account, directory):
        return DiskKVStore(geometry_of(shape), account, directory, "f00d")


def fill(store, sequence, num_tokens, seed=0):
    """Append to both layers; returns what layer 0 has."""
    for layer_idx in range(store.geometry.num_layers):
        keys, values = (random_keys(num_tokens, seed + i, GEOMETRY) for i in range(2))
        store.append(layer_idx, sequence, keys, values)
    return torch.stack([keys, values])


def test_disk_store_is_private_and_removes_only_its_own(tmp_path):
    """Directory 0700, files 0600 with a readable header; a stranger's file in the way survives."""
    (tmp_path / "kv").mkdir()
    (tmp_path / "kv" / "mine.txt").write_text("keep")
    store, _ = open_store(tmp_path / "kv")
    fill(store, store.new_sequence(), 9)
    (made,) = [path for path in (tmp_path / "kv").iterdir() if path.is_dir()]
    assert stat.S_IMODE(made.stat().st_mode) == 0o700
    files = sorted(made.iterdir())
    assert [stat.S_IMODE(path.stat().st_mode) for path in files] == [0o600] * 2
    page = files[1].read_bytes()[:4096]
    header = json.loads(page[len(MAGIC) :].rstrip(b"\0"))
    assert page.startswith(MAGIC)
    assert (header["layer"], header["fingerprint"], header["version"]) == (1, "f00d", 1)
    (made / "stranger").write_text("keep")
    store.close()
    assert [path.name for path in made.iterdir()] == ["stranger"]
    assert (tmp_path / "kv" / "mine.txt").read_text() == "keep"


def test_unwritable_directory(tmp_path):
    """A KV directory that cannot be made is one line that names it."""
    (tmp_path / "file").write_text("")
    with pytest.raises(KVStoreError, match=r"file/kv: cannot keep KV there"):
        open_store(tmp_path / "file" / "kv")


def test_full_disk_is_refused_before_writing(tmp_path, monkeypatch):
    """No room for the reservation: refused with the bytes, files as long as before."""
    store, account = open_store(tmp_path)
    with store:
        sequence = store.new_sequence()
        expected = fill(store, sequence, 6)
        sizes = [path.stat().st_size for path in sorted(tmp_path.glob("*/*"))]
        real, calls = os.posix_fallocate, []

        def full(number, offset, length):
            calls.append(length)
            if len(calls) == 2:
                raise OSError(28, "No space left on device")
            real(number, offset, length)

        monkeypatch.setattr(os, "posix_fallocate", full)
        used = account.used
        with pytest.raises(DoesNotFitError, match="bytes, or name another"):
            store.reserve(sequence, 100)
        monkeypatch.undo()
        assert [path.stat().st_size for path in sorted(tmp_path.glob("*/*"))] == sizes
        assert account.used == used
        assert torch.equal(content(store, 0, sequence), expected)


def test_failed_write_surfaces(tmp_path, monkeypatch):
    """A write that fails behind the scenes is reported by the next sealed block."""
    store, _ = open_store(tmp_path)
    sequence = store.new_sequence()

    def broken(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pwritev", broken)
    with pytest.raises(ReadError, match="Input/output error"):
        fill(store, sequence, 200)
    monkeypatch.undo()
    store.close()
    assert not list(tmp_path.iterdir())


def test_file_cut_short(tmp_path):
    """A KV file that lost its end gives a ReadError."""
    store, _ = open_store(tmp_path)
    with store:
        sequence = store.new_sequence()
        fill(store, sequence, 200)
        fill(store, sequence, 40)  # the writes of the first have been waited for
        for path in tmp_path.glob("*/*.kv"):
            os.truncate(path, 4096 * 2)
        with pytest.raises(ReadError, match="ends at byte"):
            content(store, 0, sequence)


def test_where_direct_io_is_refused():
    """In a directory without O_DIRECT the store works through the page cache."""
    memory = Path("/dev/shm")
    if not memory.is_dir():
        pytest.skip("no memory file system here")
    with tempfile.TemporaryDirectory(dir=memory) as directory:
        store, _ = open_store(directory)
        with store:
            sequence = store.new_sequence()
            expected = fill(store, sequence, 50)
            assert torch.equal(content(store, 1, sequence), expected)


def test_a_block_that_was_not_written_is_never_read_as_zeros(tmp_path, monkeypatch):
    """After one failed write every call says so, until the block is dropped; then all works."""
    store, _ = open_store(tmp_path)
    with store:
        sequence = store.new_sequence()
        keys = random_keys(6, 1, GEOMETRY)
        store.append(1, sequence, keys, keys)
        wait_for_writes(store)
        real = os.pwritev

        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "pwritev", full)
        store.append(0, sequence, keys, keys)
        wait_for_writes(store)
        monkeypatch.setattr(os, "pwritev", real)
        for _ in range(2):
            with pytest.raises(DoesNotFitError, match="writing failed"):
                store.append(0, sequence, keys, keys)
            with pytest.raises(DoesNotFitError, match="writing failed"):
                store.reserve(sequence, 100)
            with pytest.raises(DoesNotFitError, match="writing failed"):
                store.blocks(0, sequence)
            store.truncate(sequence, 6)
        store.truncate(sequence, 3)  # brings the block back from memory
        assert torch.equal(content(store, 0, sequence)[0], keys[:, :3])
        assert torch.equal(store_again(store, sequence, keys), torch.cat([keys[:, :3], keys], 1))


def test_fork_that_cannot_be_read_leaves_nothing(tmp_path):
    """A ReadError in a fork leaves the account as it was."""
    store, account = open_store(tmp_path)
    with store:
        sequence = store.new_sequence()
        fill(store, sequence, 8)
        wait_for_writes(store)
        for path in tmp_path.glob("*/*.kv"):
            os.truncate(path, 4096)
        used = account.used
        with pytest.raises(ReadError, match="ends at byte"):
            store.fork(sequence, 6)
        with pytest.raises(ReadError, match="ends at byte"):
            store.truncate(sequence, 6)
        assert store.num_tokens(sequence) == 8
        store.truncate(sequence, 0)
        assert account.used < used


def test_every_live_iterator_is_accounted(tmp_path):
    """Staging beyond the first set is charged while its iterator lives, and many runs are read."""
    account = MemoryAccount("memory", 10**8)
    with DiskKVStore(GEOMETRY, account, tmp_path, "f00d", staging_bytes=2 * 4096) as store:
        sequence = store.new_sequence()
        expected = fill(store, sequence, 43)
        used = account.used
        iterators = [store.blocks(0, sequence) for _ in range(3)]
        rows = [[torch.stack(pair) for pair in pairs] for pairs in zip(*iterators, strict=True)]
        for i in range(3):
            assert torch.equal(torch.cat([row[i] for row in rows], dim=2), expected)
        iterators = [store.blocks(0, sequence) for _ in range(3)]
        for iterator in iterators:
            next(iterator)
        assert account.used == used + 2 * 2 * 2 * 4096
        del iterators, iterator
        assert account.used == used


def test_disk_space_is_given_back(tmp_path):
    """Files shrink when their last blocks are freed, and freed slots are used again."""
    store, _ = open_store(tmp_path)
    with store:
        first, second = store.new_sequence(), store.new_sequence()
        fill(store, first, 40)
        expected = fill(store, second, 40)
        size = store.tier_bytes().disk
        assert size == sum(path.stat().st_size for path in tmp_path.glob("*/*"))
        store.release(first)
        assert store.growth_bytes(second, 80).disk == 0
        store.reserve(second, 80)
        assert store.tier_bytes().disk == size
        assert torch.equal(content(store, 0, second), expected)
        store.release(second)
        assert store.tier_bytes().disk == 2 * 4096


def test_closing_under_an_iterator(tmp_path):
    """An iterator that outlives its store says so, and the account stays even."""
    store, account = open_store(tmp_path)
    sequence = store.new_sequence()
    fill(store, sequence, 43)
    iterator = store.blocks(0, sequence)
    next(iterator)
    store.close()
    with pytest.raises(KVStoreError, match="closed"):
        next(iterator)
    del iterator
    assert account.used == 0


@pytest.mark.parametrize("refused", ["posix_fallocate", "pwritev"])
def test_file_systems_that_can_do_less(refused, tmp_path, monkeypatch):
    """No preallocation, or O_DIRECT refused at its first use: slower guarantees, same content."""
    real = getattr(os, refused)

    def refuse(file, *arguments):
        if refused == "posix_fallocate":
            raise OSError(95, "Operation not supported")
        if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return real(file, *arguments)

    monkeypatch.setattr(os, refused, refuse)
    store, _ = open_store(tmp_path)
    with store:
        sequence = store.new_sequence()
        expected = fill(store, sequence, 50)
        wait_for_writes(store)
        assert torch.equal(content(store, 1, sequence), expected)


def test_process_that_ends_without_closing_leaves_nothing(tmp_path):
    """The user's text does not stay on the disk when a program forgets to close the store."""
    code = f"""
import torch
from pathlib import Path
from ollm_core.kv.disk.storage import DiskKVStore
from ollm_core.contracts.kv import KVGeometry
from ollm_core.memory.accounts import MemoryAccount
geometry = KVGeometry.uniform(1, 1, 4, torch.float32, torch.device("cpu"), 4)
store = DiskKVStore(geometry, MemoryAccount("memory", 10**8), Path({str(tmp_path)!r}), "f00d")
store.append(0, store.new_sequence(), torch.ones(1, 9, 4), torch.ones(1, 9, 4))
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])
    assert list(tmp_path.iterdir()) == []


def wait_for_writes(store):
    """Return when the disk has, or has refused, every sealed block."""
    while store._storage._writes._pending:
        time.sleep(0.001)


def store_again(store, sequence, keys):
    """Append to layer 0, and all keys it then has."""
    store.append(0, sequence, keys, keys)
    return content(store, 0, sequence)[0]
