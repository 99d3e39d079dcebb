"""Two planes of a tensor: every bit pattern comes back, and damage is told, never decoded."""

from __future__ import annotations

import tracemalloc
from unittest import mock

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from ollm_core import CheckpointError
from ollm_core.weights.formats import byte_planes

PATTERNS = st.one_of(
    st.lists(st.integers(0, 0xFFFF), min_size=1, max_size=300),
    st.lists(st.sampled_from([0, 0x8000, 1, 0x7F80, 0xFF80, 0x7FC0, 0x7F81]), min_size=1),
)
SMALL = mock.patch.object(byte_planes, "FRAME", 64)


def encode(numbers):
    """Both planes of numbers of 16 bits."""
    numbers = np.asarray(numbers, np.uint16)
    high = (numbers >> 8).astype(np.uint8)
    cuts = range(0, len(high), byte_planes.FRAME)
    frames = [byte_planes.compress_frame(high[i : i + byte_planes.FRAME]) for i in cuts]
    return b"".join(byte_planes.join_frames(frames, len(high))), numbers.astype(np.uint8)


def decode(high, low, dtype=torch.bfloat16, num_threads=1):
    """The bits that come back."""
    high = torch.from_numpy(np.frombuffer(bytearray(high), np.uint8))
    value = byte_planes.decode(high, torch.from_numpy(low), dtype, num_threads, "a tensor")
    assert value.dtype == dtype
    return value.view(torch.int16).numpy().view(np.uint16)


@given(PATTERNS, st.sampled_from([1, 3]), st.sampled_from([torch.bfloat16, torch.float16]))
@settings(max_examples=60, deadline=None)
def test_every_pattern_comes_back(numbers, num_threads, dtype):
    """NaNs with any payload, infinities, denormals, both zeros: bit for bit, over several frames
    and with several threads.
    """
    with SMALL:
        high, low = encode(numbers)
        assert len(high) % byte_planes.ALIGNMENT == 0
        assert np.array_equal(decode(high, low, dtype, num_threads), numbers)


def test_all_65536_patterns():
    """Each once, in one frame of the real size."""
    every = np.arange(1 << 16, dtype=np.uint16)
    assert np.array_equal(decode(*encode(every)), every)


@pytest.mark.parametrize("own_pages", [0, byte_planes._OWN_PAGES])
def test_random_weights_become_a_third_smaller(monkeypatch, own_pages):
    """What weights look like: normal numbers of one scale. Decoded into either kind of memory."""
    monkeypatch.setattr(byte_planes, "_OWN_PAGES", own_pages)
    values = (
        torch.randn(byte_planes.FRAME + 1000, generator=torch.Generator().manual_seed(0)) * 0.02
    )
    bits = values.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    high, low = encode(bits)
    assert (len(high) + low.nbytes) / bits.nbytes < 0.68
    assert np.array_equal(decode(high, low, num_threads=2), bits)


@given(PATTERNS, st.data())
@settings(max_examples=150, deadline=None)
def test_a_flipped_bit_is_told(numbers, data):
    """It is refused, or changed nothing: other numbers never come out."""
    with SMALL:
        high, low = encode(numbers)
        place = data.draw(st.integers(0, 8 * len(high) - 1))
        damaged = bytearray(high)
        damaged[place // 8] ^= 1 << place % 8
        try:
            found = decode(damaged, low)
        except CheckpointError:
            return
        assert np.array_equal(found, numbers)


@given(PATTERNS, st.data())
@settings(max_examples=60, deadline=None)
def test_what_is_cut_short_is_told(numbers, data):
    """At any byte, whether the index still says what was there or not."""
    with SMALL:
        high, low = encode(numbers)
        end = data.draw(st.integers(0, len(high.rstrip(b"\0")) - 1))
        with pytest.raises(CheckpointError, match="cannot be decoded"):
            decode(high[:end], low)


def frame(content, **options):
    """A frame of zstd as another program might write it."""
    return zstandard.ZstdCompressor(**options).compress(content)


LIES = {
    "more than stated in all": frame(bytes(101)),
    "a bomb": frame(bytes(1 << 24)),
    "less": frame(bytes(99)),
    "no stated size": frame(bytes(100), write_content_size=False),
    "no frame": b"x" * 40,
    "nothing": b"",
    "only a header": frame(bytes(100))[:6],
    "a dictionary that is not there": frame(
        bytes(range(100)), dict_data=zstandard.ZstdCompressionDict(b"some dictionary" * 20)
    )[:9],
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_frame_is_told(lie):
    """A frame that holds something else than its place needs takes no memory for it."""
    high = b"".join(byte_planes.join_frames([LIES[lie]], 100))
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="a tensor, frame 0 of 1 cannot be decoded"):
        decode(high, np.zeros(100, np.uint8))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.parametrize("other", [0, 99, 101, 1 << 40])
def test_another_number_of_elements_is_told(other):
    """The plane of another tensor."""
    high, _ = encode(range(100))
    with pytest.raises(CheckpointError, match=r"not those of|cut short"):
        decode(high, np.zeros(other if other < 1000 else 3 * byte_planes.FRAME, np.uint8))


@pytest.mark.parametrize("num_threads", [1, 2])
def test_scratch_holds_what_is_taken(num_threads):
    """Of memory that Python sees, zstd's own aside, no more than is declared for it."""
    numbers = np.arange(3 * byte_planes.FRAME, dtype=np.uint64).astype(np.uint16)
    high, low = encode(numbers)
    blob = torch.from_numpy(np.frombuffer(bytearray(high), np.uint8))
    byte_planes.decode(blob, torch.from_numpy(low), torch.bfloat16, num_threads, "a")
    tracemalloc.start()
    byte_planes.decode(blob, torch.from_numpy(low), torch.bfloat16, num_threads, "a")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # One thread may have done all of it before the other began.
    assert byte_planes.FRAME <= peak <= byte_planes.scratch_bytes(low.size, num_threads)
