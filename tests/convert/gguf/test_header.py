"""Headers of GGUF files, which may be hostile: one line, and nothing allocated."""

from __future__ import annotations

import functools
import os
import struct
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ollm_core import InputError, OllmError
from ollm_core.convert.gguf.header import read_header
from ollm_core.convert.gguf.importer import import_gguf

pytest.importorskip("gguf")
pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries that do the reading


def header(num_tensors=0, num_keys=0, rest=b"", version=3):
    """The bytes of a file with these counts."""
    return struct.pack("<4sIQQ", b"GGUF", version, num_tensors, num_keys) + rest


def key(name, kind, value):
    """One key, its type and the bytes of its value."""
    return struct.pack(f"<Q{len(name)}sI", len(name), name.encode(), kind) + value


def entry(*shape, kind=0, offset=0):
    """One tensor."""
    numbers = struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
    return struct.pack("<Q", 1) + b"t" + numbers


HUGE = 1 << 60
HOSTILE = {
    "nothing": header(),
    "version": header(version=9),
    "byte order": header(version=3 << 24),
    "keys": header(num_keys=HUGE),
    "tensors": header(num_tensors=HUGE),
    "keys that are not there": header(num_keys=1000),
    "long name": header(0, 1, struct.pack("<Q", HUGE)),
    "long text": header(0, 1, key("a", 8, struct.pack("<Q", HUGE))),
    "long array": header(0, 1, key("a", 9, struct.pack("<IQ", 0, HUGE))),
    "array past the end": header(0, 1, key("a", 9, struct.pack("<IQ", 0, 1 << 20))),
    "texts past the end": header(0, 1, key("a", 9, struct.pack("<IQ", 8, 1 << 20))),
    "array of arrays": header(0, 1, key("a", 9, struct.pack("<IQ", 9, 1)) + bytes(64)),
    "unknown type": header(0, 1, key("a", 99, bytes(8))),
    "no text": header(0, 1, key("a", 8, struct.pack("<Q", 2) + b"\xff\xfe")),
    "key twice": header(0, 2, 2 * key("a", 0, b"\1")),
    "alignment": header(0, 1, key("general.alignment", 4, struct.pack("<I", 3))),
    "tensor past the end": header(1, 0, entry(4, 4)),
    "tensor too large": header(1, 0, entry(HUGE, HUGE, HUGE)),
    "tensor without shape": header(1, 0, entry()),
    "many dimensions": header(1, 0, entry(*[1] * 99)),
    "unknown kind": header(1, 0, entry(4, kind=77) + bytes(64)),
    "half a block": header(1, 0, entry(31, kind=8) + bytes(640)),
    "tensor twice": header(2, 0, 2 * entry(1) + bytes(640)),
    "offset": header(1, 0, entry(1, offset=1) + bytes(640)),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers(tmp_path, case):
    """Counts and sizes that lie are one line, and allocate nothing."""
    path = tmp_path / "x.gguf"
    path.write_bytes(HOSTILE[case])
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=r"x\.gguf") as refused:
            import_gguf(path, tmp_path / "out")
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()
    assert str(refused.value).isprintable()


def test_a_pipe(tmp_path):
    """What is no file is not waited for."""
    os.mkfifo(tmp_path / "x.gguf")
    with pytest.raises(InputError, match="regular"):
        import_gguf(tmp_path / "x.gguf", tmp_path / "out")


@functools.cache
def whole_file():
    """The bytes of a good header."""
    rest = key("general.architecture", 8, struct.pack("<Q", 5) + b"llama")
    rest += key("tokenizer.ggml.tokens", 9, struct.pack("<IQQ", 8, 1, 3) + b"abc")
    return header(1, 2, rest + entry(4, 2, kind=0)) + bytes(64)


@given(places=st.lists(st.integers(0, 200), max_size=4), values=st.binary(min_size=4, max_size=4))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_damaged_headers(tmp_path_factory, places, values):
    """Bytes changed anywhere: it is read, or it is one line."""
    raw = bytearray(whole_file())
    for place, value in zip(places, values, strict=False):
        raw[place % len(raw)] = value
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    path.write_bytes(raw)
    told = ""
    try:
        read_header(path)
    except OllmError as error:
        told = str(error)
    assert told.isprintable()
