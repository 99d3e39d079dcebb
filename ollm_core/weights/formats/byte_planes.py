"""Numbers of two bytes as two planes: the low bytes as they are, the high bytes compressed.

In bfloat16 weights the high byte holds the sign and most of the exponent, some 2.7 bits of
information in 8; the low byte holds the mantissa, which is noise. So a third of the bytes goes, and
none of the information. The high plane is cut into frames of `FRAME` bytes, each compressed alone
with zstd, so that several threads can decode them.

A compressed plane is, little-endian: the eight bytes of `_MAGIC`, the number of elements as u64,
the size of each frame as u32, the frames one after another, and up to 63 zero bytes.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from ollm_core.device.buffers import aligned_buffer, as_memoryview
from ollm_core.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FRAME = 256 << 10
"""Elements of a frame, the last one excepted: what is decoded stays in a core's cache."""
ALIGNMENT = 64
"""Bytes, of which the size of a compressed plane is a multiple: what follows it stays aligned."""

_MAGIC = b"ollm-zp1"
_HEAD = struct.Struct("<8sQ")
_SIZE_BYTES = 4
_DECODE_RATE = 1.5e9  # bytes of decoded numbers a second on one core, as docs/compressed.md has it
_OWN_PAGES = 8 << 20  # each takes three of a process's 65,530 maps, and experts are many and small
_WINDOW = FRAME  # no frame refers back farther
_DECODER_BYTES = 640 << 10  # zstd's own, for one thread and the largest window allowed


def compress_frame(high: Any) -> bytes:
    """One frame of the high plane, at most `FRAME` bytes in a buffer.

    Matches of seven bytes and a small table find what really repeats and little else, so that
    nearly all is Huffman codes: smaller than the preset levels make it, and faster both ways.
    """
    import zstandard

    parameters = zstandard.ZstdCompressionParameters.from_level(
        1,
        window_log=_WINDOW.bit_length() - 1,
        hash_log=6,
        min_match=7,
        strategy=zstandard.STRATEGY_FAST,
        write_checksum=True,
    )
    return zstandard.ZstdCompressor(compression_params=parameters).compress(high)


def join_frames(frames: Sequence[bytes], num_elements: int) -> Iterable[bytes]:
    """The parts of the compressed plane of `num_elements` that are in these frames, in order."""
    index = struct.pack(f"<{len(frames)}I", *map(len, frames))
    num_bytes = _HEAD.size + len(index) + sum(map(len, frames))
    yield _HEAD.pack(_MAGIC, num_elements)
    yield index
    yield from frames
    yield bytes(-num_bytes % ALIGNMENT)


def least_bytes(num_elements: int) -> int:
    """Bytes of the head and the index of a compressed plane: no plane is smaller."""
    return _HEAD.size + _SIZE_BYTES * _num_frames(num_elements)


def scratch_bytes(num_elements: int, num_threads: int) -> int:
    """The most that `decode` holds beside its arguments and its result."""
    one = min(FRAME, num_elements) + _DECODER_BYTES
    return min(num_threads, _num_frames(num_elements)) * one


def decode_seconds(num_elements: int, num_threads: int) -> float:
    """About how long `decode` takes, on cores that have nothing else to do."""
    return 2 * num_elements / (_DECODE_RATE * max(min(num_threads, _num_frames(num_elements)), 1))


def decode(high: Tensor, low: Tensor, dtype: torch.dtype, num_threads: int, name: str) -> Tensor:
    """The tensor in `dtype`, of two bytes, of a compressed plane `high` and of `low`, bytes of the
    tensor's shape, all on the CPU; in new memory.

    Raises CheckpointError, with the tensor's `name`, for a plane that is not of this form.
    """
    frames = _frames(high, low.numel(), name)
    value = _new_memory(2 * low.numel())
    joined = value.numpy().view("<u2")
    low_bytes = low.reshape(-1).numpy()
    todo = deque(enumerate(frames))

    def work() -> None:
        import numpy as np
        import zstandard

        decoder = zstandard.ZstdDecompressor(max_window_size=_WINDOW)
        scratch = np.empty(min(FRAME, low.numel()), np.uint8)
        while todo:
            try:
                i, frame = todo.popleft()
            except IndexError:  # another thread took the last one
                return
            part = slice(i * FRAME, (i + 1) * FRAME)
            numbers = joined[part]
            bytes_of_it = scratch[: len(numbers)]
            _decompress(decoder, frame, bytes_of_it, f"{name}, frame {i} of {len(frames)}")
            np.left_shift(bytes_of_it, 8, out=numbers, dtype=np.uint16)
            np.bitwise_or(numbers, low_bytes[part], out=numbers)

    helpers = min(num_threads, len(frames)) - 1
    if helpers < 1:
        work()
    else:
        with ThreadPoolExecutor(helpers, thread_name_prefix="ollm-decoder") as pool:
            others = [pool.submit(work) for _ in range(helpers)]
            work()
        for other in others:
            other.result()
    return value.view(dtype).view(low.shape)


def _new_memory(num_bytes: int) -> Tensor:
    """Bytes for a result: on huge pages, if so large that a model keeps few of them."""
    import torch

    large = num_bytes >= _OWN_PAGES
    return aligned_buffer(num_bytes) if large else torch.empty(num_bytes, dtype=torch.uint8)


def _frames(high: Tensor, num_elements: int, name: str) -> list[Any]:
    """The bytes of each frame. Raises CheckpointError unless they fill the plane."""
    raw = as_memoryview(high)
    if len(raw) < least_bytes(num_elements):
        raise _damaged(name, f"its high bytes are cut short at {len(raw)}")
    magic, stated = _HEAD.unpack_from(raw)
    if magic != _MAGIC or stated != num_elements:
        raise _damaged(name, f"its high bytes are not those of {num_elements} elements")
    count = _num_frames(num_elements)
    sizes = struct.unpack_from(f"<{count}I", raw, _HEAD.size)
    begin = least_bytes(num_elements)
    padding = len(raw) - begin - sum(sizes)
    if not 0 <= padding < ALIGNMENT or any(raw[len(raw) - padding :]):
        raise _damaged(name, f"the frames of its high bytes take {sum(sizes)} of {len(raw)} bytes")
    frames = []
    for size in sizes:
        frames.append(raw[begin : begin + size])
        begin += size
    return frames


def _decompress(decoder: Any, frame: Any, into: Any, what: str) -> None:
    """Fill `into` with what is in `frame`, which must be just that. Raises CheckpointError."""
    import zstandard

    try:
        stated = zstandard.get_frame_parameters(frame).content_size
        if stated != len(into):
            raise _damaged(what, f"it states {stated} bytes, expected {len(into)}")
        with decoder.stream_reader(frame) as reader:
            done = 0
            while done < len(into):
                count = reader.readinto(memoryview(into)[done:])
                if count == 0:
                    raise _damaged(what, f"it ends after {done} of {len(into)} bytes")
                done += count
            if reader.read(1):  # and the checksum at the end is looked at
                raise _damaged(what, f"it holds more than {len(into)} bytes")
    except zstandard.ZstdError as error:
        raise _damaged(what, " ".join(str(error).split())) from error


def _num_frames(num_elements: int) -> int:
    return -(-num_elements // FRAME)


def _damaged(what: str, why: str) -> CheckpointError:
    return CheckpointError(f"{what} cannot be decoded: {why}", hint="convert the model again")
