"""A conversion whose original or whose own files are not what they were: it says so, or is that of
the original as it is now, and never of two.
"""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from ollm_core import InputError, ReadError
from ollm_core.checkpoint.safetensors import open_checkpoint
from ollm_core.convert.compress import convert
from ollm_core.plugins.factories import CodecRequest
from ollm_core.weights.formats.compressed import FORMAT, FORMAT_KEY, compressed_weights

FOREIGN = "which is not of this conversion"


@pytest.fixture
def original(make_llama):
    """A bfloat16 model of several files."""
    return make_llama(torch.bfloat16, shard="100KB")


def change(path):
    """One element in the middle of the largest tensor becomes another, by a file of equal size."""
    tensors = load_file(path)
    largest = max(tensors.values(), key=torch.numel)
    largest.view(-1)[largest.numel() // 2] += 1
    save_file(tensors, path.with_suffix(".new"), dict(open_checkpoint(path.parent).metadata[path]))
    assert path.with_suffix(".new").stat().st_size == path.stat().st_size
    path.with_suffix(".new").replace(path)


def broken_off(original, out, num_files):
    """Convert, until so many files are there; their names."""

    def stop(progress):
        if len(list(out.glob("*.safetensors"))) == num_files:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(original, out, min_bytes=1024, on_progress=stop)
    return sorted(path.name for path in out.glob("*.safetensors"))


def assert_same(original, out):
    """Every tensor of `original` comes out of `out`, bit for bit."""
    made = open_checkpoint(out)
    encoded = compressed_weights(CodecRequest({}, made.tensors, made.metadata))
    stored = {k: v for path in made.files for k, v in load_file(path).items()}
    for path in open_checkpoint(original).files:
        for name, expected in load_file(path).items():
            found = stored.get(name)
            if name in encoded:
                found = encoded[name].decode(*(stored[part] for part in encoded[name].tensors))
            assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8)), name


def test_a_finished_file_of_another_original_is_refused(original, tmp_path):
    """The original was replaced after the first file was done: that file is named, and nothing is
    mixed; without it the conversion is that of the new original.
    """
    out = tmp_path / "out"
    first, second = broken_off(original, out, 2)
    before = (out / second).stat().st_mtime_ns
    change(original / first)
    with pytest.raises(InputError, match=f"holds '{first}', {FOREIGN}"):
        convert(original, out, min_bytes=1024)
    assert not (out / "config.json").exists()
    (out / first).unlink()
    made = convert(original, out, min_bytes=1024)
    assert made.num_found == 1
    assert (out / second).stat().st_mtime_ns == before
    assert_same(original, out)


def test_what_was_not_converted_may_change(original, tmp_path):
    """Only files that are still missing were replaced: the conversion is that of the original as
    it is now.
    """
    out = tmp_path / "out"
    found = broken_off(original, out, 1)
    others = [path for path in open_checkpoint(original).files if path.name not in found]
    change(others[-1])
    assert convert(original, out, min_bytes=1024).num_found == 1
    assert_same(original, out)


def flip(path):
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(size - size // 3)
        byte = file.read(1)[0]
        file.seek(size - size // 3)
        file.write(bytes([byte ^ 1]))


def with_one_more(path):
    tensors = load_file(path)
    save_file(tensors | {"more": torch.ones(2)}, path, {FORMAT_KEY: FORMAT})


def of_zeros(path):
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize("damage", [flip, with_one_more, of_zeros])
def test_a_damaged_finished_file_is_refused(original, tmp_path, damage):
    """A flipped bit, a tensor too many or zeros in what an earlier run finished."""
    out = tmp_path / "out"
    (name,) = broken_off(original, out, 1)
    damage(out / name)
    with pytest.raises(InputError, match=f"holds '{name}', {FOREIGN}"):
        convert(original, out, min_bytes=1024)


def test_a_copy_of_the_original_is_no_conversion(original, tmp_path):
    """A file of the right name and content that is not compressed is somebody else's."""
    out = tmp_path / "out"
    out.mkdir()
    path = next(iter(open_checkpoint(original).files))
    shutil.copy(path, out)
    with pytest.raises(InputError, match=FOREIGN):
        convert(original, out, min_bytes=1024)


@pytest.mark.parametrize("part", [0.1, 0.45, 0.9])
@pytest.mark.parametrize("name", ["weights", "config.json"])
def test_an_original_that_changes_meanwhile(original, tmp_path, part, name):
    """Replaced while it is converted: a ReadError, and no model; the next run makes the new one."""
    out = tmp_path / "out"
    path = list(open_checkpoint(original).files)[0 if part > 0.4 else -1]
    if name == "config.json":
        path = original / name
    seen = []

    def replace(progress):
        if progress.bytes_done >= part * progress.bytes_total and not seen:
            seen.append(progress)
            if name == "config.json":
                path.write_text(path.read_text() + " ")
            else:
                change(path)

    with pytest.raises(ReadError, match=f"{path.name}: changed while"):
        convert(original, out, min_bytes=1024, on_progress=replace)
    assert not (out / "config.json").exists()
    if part > 0.4 and name != "config.json":
        with pytest.raises(InputError, match=f"holds '{path.name}', {FOREIGN}"):
            convert(original, out, min_bytes=1024)
        (out / path.name).unlink()
    convert(original, out, min_bytes=1024)
    assert_same(original, out)
