"""The file of an unfinished prompt: what was written is read, anything else is refused."""

from __future__ import annotations

import json
import os
from array import array
from dataclasses import replace

import pytest
import torch
from kept_prefixes import GEOMETRY

from ollm_core.device.buffers import PAGE, aligned_buffer
from ollm_core.errors import KVStoreError
from ollm_core.kv.disk.directory import home_fields
from ollm_core.kv.disk.journal import LayerBlocks, Prefix
from ollm_core.kv.disk.layer_file import MAGIC
from ollm_core.kv.disk.unfinished import (
    Unfinished,
    fill_tensors,
    is_whole,
    read_unfinished,
    remove_partial,
    sound_unfinished,
    unfinished_files,
    unfinished_path,
    write_unfinished,
)

KEY = bytes(range(16))
LAYER = LayerBlocks(0, array("I", [0, 1, 2, 3]), array("Q", [5, 6, 7, 1 << 63]))
ONE = Unfinished(KEY, Prefix(array("i", range(15)), (LAYER,), 77), 0, 1, 2, torch.bfloat16, 12_345)
FIELDS = home_fields(GEOMETRY, "f00d")
STAGING = aligned_buffer(PAGE)


class File:
    """Of a layer, with so many slots."""

    num_slots = 4


def tensors():
    """More than the staging holds, in several dtypes."""
    made = torch.Generator().manual_seed(0)
    return [
        torch.randn(3, 7, 70, generator=made).to(torch.bfloat16),
        torch.randn(5, generator=made),
        torch.zeros(0),
        torch.randn(2, 900, generator=made).to(torch.bfloat16),
    ]


def written(directory, one=ONE):
    """The file, and what `write_unfinished` returns."""
    found = write_unfinished(directory, FIELDS, one, tensors(), STAGING)
    return unfinished_path(directory, one.key), found


def test_what_was_written_is_read(tmp_path):
    """Tokens, blocks, numbers and tensors, bit for bit; nothing else is left there."""
    path, found = written(tmp_path)
    assert unfinished_files(tmp_path) == [path]
    assert [one.name for one in tmp_path.iterdir()] == [path.name]
    fields, read = read_unfinished(path)
    assert fields == {"version": 1, **FIELDS}
    assert read == found == replace(ONE, **sizes_of(found))
    assert read.file_bytes == path.stat().st_size
    assert is_whole(tmp_path, read, STAGING)
    again = [torch.empty_like(one) for one in tensors()]
    fill_tensors(tmp_path, read, again, STAGING)
    assert all(map(torch.equal, again, tensors()))


def sizes_of(one):
    """What only writing tells."""
    names = ("index_bytes", "tensor_bytes", "tensor_sum")
    return {name: getattr(one, name) for name in names}


def test_the_next_one_takes_its_place(tmp_path):
    """Of the same key; one of another key stands beside it."""
    path, _ = written(tmp_path)
    written(tmp_path, replace(ONE, num_done=2, prefix=replace(ONE.prefix, layers=(LAYER, LAYER))))
    other, _ = written(tmp_path, replace(ONE, key=bytes(16)))
    assert read_unfinished(path)[1].num_done == 2
    assert set(unfinished_files(tmp_path)) == {path, other}


def test_a_failed_write_leaves_what_was_there(tmp_path):
    """And no part of the new one."""
    path, _ = written(tmp_path)
    before = path.read_bytes()

    def broken():
        yield torch.zeros(4000)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_unfinished(tmp_path, FIELDS, ONE, broken(), STAGING)
    assert [one.name for one in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == before


def test_what_a_killed_process_was_writing_is_ours(tmp_path):
    """It begins with the magic at any moment, so that it is removed with the rest."""
    seen = []

    def watching():
        seen.extend(one.read_bytes() for one in tmp_path.iterdir())
        yield torch.zeros(3)

    write_unfinished(tmp_path, FIELDS, ONE, watching(), STAGING)
    assert [one.startswith(MAGIC) for one in seen] == [True]
    (tmp_path / "prefixes.unfinished.new").write_bytes(seen[0])
    remove_partial(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("seed", range(40))
def test_damage_is_refused(tmp_path, seed):
    """A bit in any place, or a cut: the file is refused, or not whole. Never anything else."""
    path, found = written(tmp_path)
    made = torch.Generator().manual_seed(seed)
    raw = bytearray(path.read_bytes())
    places = [place for place in range(len(raw)) if place >= PAGE or raw[place]]  # no padding
    place = places[int(torch.randint(len(places), (1,), generator=made))]
    if seed % 4 == 0:
        del raw[place:]
    else:
        raw[place] ^= 1 << seed % 8
    path.write_bytes(raw)
    try:
        fields, read = read_unfinished(path)
    except KVStoreError:
        return
    same = fields == {"version": 1, **FIELDS} and read == found
    assert not same or not is_whole(tmp_path, read, STAGING)


@pytest.mark.parametrize(
    "changed",
    [
        {"start": -1},
        {"start": True},
        {"start": 15},
        {"done": 3},
        {"done": 0},
        {"layers": 10**9},
        {"layers": 1e3},
        {"claim": 1 << 60},
        {"dtype": "float64"},
        {"dtype": ["bfloat16"]},
        {"index": [1 << 40, 0]},
        {"index": [1]},
        {"index": None},
        {"tensors": [1 << 49, 0]},
        {"tensors": "ab"},
        {"start": "0"},
    ],
)
def test_hostile_numbers_are_refused(tmp_path, changed):
    """Before anything is made that is as long as they say."""
    path, _ = written(tmp_path)
    raw = bytearray(path.read_bytes())
    header = json.loads(raw[len(MAGIC) : PAGE].rstrip(b"\0"))
    header["pass"] |= changed
    raw[:PAGE] = (MAGIC + json.dumps(header).encode()).ljust(PAGE, b"\0")
    path.write_bytes(raw)
    with pytest.raises(KVStoreError, match="damaged"):
        read_unfinished(path)


@pytest.mark.parametrize("about", [None, [], "pass", 5])
def test_a_header_of_something_else_is_refused(tmp_path, about):
    """As that of a layer file, which has the same magic."""
    path, _ = written(tmp_path)
    raw = bytearray(path.read_bytes())
    page = MAGIC + json.dumps({"version": 1, **FIELDS, "pass": about}).encode()
    raw[:PAGE] = page.ljust(PAGE, b"\0")
    path.write_bytes(raw)
    with pytest.raises(KVStoreError, match="damaged"):
        read_unfinished(path)


def test_links_and_others_files_are_not_followed(tmp_path):
    """What lies behind a link is not read, and not removed."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    path, found = written(elsewhere)
    home = tmp_path / "home"
    home.mkdir()
    (home / path.name).symlink_to(path)
    with pytest.raises(OSError, match="symbolic"):
        read_unfinished(home / path.name)
    assert sound_unfinished(home, FIELDS, [], [File, File], GEOMETRY) == []
    assert not os.path.lexists(home / path.name)
    assert is_whole(elsewhere, found, STAGING)


@pytest.mark.parametrize(
    "changed",
    [
        {"num_done": 0, "prefix": replace(ONE.prefix, layers=())},
        {"start": 12},
        {"prefix": replace(ONE.prefix, layers=(replace(LAYER, first=1),))},
        {"prefix": replace(ONE.prefix, layers=(replace(LAYER, blocks=array("I", [0, 1, 2, 4])),))},
        {"prefix": replace(ONE.prefix, layers=(replace(LAYER, blocks=array("I", [0, 1, 2, 2])),))},
        {"prefix": replace(ONE.prefix, layers=(LAYER, LAYER, LAYER)), "num_done": 3,
         "num_layers": 3},
        {"prefix": replace(ONE.prefix, token_ids=array("i", [*range(14), -1]))},
        {"prefix": replace(ONE.prefix, token_ids=array("i", range(20)))},
    ],
)  # fmt: skip
def test_blocks_that_cannot_be_are_refused(tmp_path, changed):
    """Of which the checksum says nothing: whoever wrote it, wrote it so."""
    path, _ = written(tmp_path, replace(ONE, **changed))
    assert sound_unfinished(tmp_path, FIELDS, [], [File, File], GEOMETRY) == []
    assert not path.exists()


def test_a_sound_one_stays(tmp_path):
    """Unless it is of another model, or a prefix knows another content of one of its blocks."""
    _, found = written(tmp_path)
    files = [File, File]
    assert sound_unfinished(tmp_path, FIELDS, [], files, GEOMETRY) == [found]
    same = Prefix(
        array("i", range(4)), (replace(LAYER, blocks=array("I", [2]), checksums=array("Q", [7])),)
    )
    assert sound_unfinished(tmp_path, FIELDS, [same], files, GEOMETRY) == [found]
    other = replace(same, layers=(replace(same.layers[0], checksums=array("Q", [8])),))
    assert sound_unfinished(tmp_path, FIELDS, [other], files, GEOMETRY) == []
    written(tmp_path)
    assert sound_unfinished(tmp_path, FIELDS | {"fingerprint": "b"}, [], files, GEOMETRY) == []
