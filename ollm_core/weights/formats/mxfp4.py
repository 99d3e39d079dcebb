"""MXFP4: 32 numbers of 4 bits share a power of two. Parameters that are stored so stay packed on
disk, in host memory and on their way to the device, and are made there, slice by slice.

No torch is imported before something is decoded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ollm_core.contracts.tensors import ParameterSource, StoredForm

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 32
"""Numbers that share a scale."""

_BLOCK_BYTES = BLOCK // 2
_BLOCK_WORDS = BLOCK // 4
_CHUNK_NUMBERS = 1 << 22  # at once: more leaves the CPU's caches, fewer take more calls
_BYTES_PER_WORD = 2 + 2 + 4  # itself, a number of its four, and that in float32
_BYTES_PER_SCALE = 4 + 4 + 4  # itself, its factor, and the rest of that
_SIGN_AND_NUMBER = -0x7200  # bits 15 and 9 to 11: as a float16, the number times 2 ** -14
_LARGEST = 240  # of the scales whose factor times 2 ** 14 is a finite float32


def mxfp4_source(
    parameter: str, num_inputs: int, num_outputs: int, row: int | None = None
) -> ParameterSource:
    """The source of a parameter [num_inputs, num_outputs] that is stored packed, as
    `{parameter}_blocks` [num_outputs, num_inputs / 32, 16] and `{parameter}_scales`
    [num_outputs, num_inputs / 32], bytes both; with `row`, of that slice of a stack of such.

    `num_inputs` must be a multiple of 32.
    """
    num_blocks = num_inputs // BLOCK
    blocks, scales = f"{parameter}_blocks", f"{parameter}_scales"
    return ParameterSource(
        (blocks, scales),
        dequantize_mxfp4,
        _scratch_bytes(num_blocks, num_outputs),
        row,
        makes="BF16",
        stored=(
            StoredForm("U8", (num_outputs, num_blocks, _BLOCK_BYTES)),
            StoredForm("U8", (num_outputs, num_blocks)),
        ),
    )


def dequantize_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """`blocks` [O, G, 16] and `scales` [O, G], bytes, -> bfloat16 [G * 32, O] on their device, each
    number exactly. Nothing waits for a device.

    The first of two numbers is in the low half of its byte: a sign, two bits of exponent and one of
    mantissa. A scale s stands for 2 ** (s - 127).
    """
    import torch

    num_outputs, num_blocks, _ = blocks.shape
    device = blocks.device
    out = torch.empty(num_blocks, _BLOCK_WORDS, 4, num_outputs, dtype=torch.bfloat16, device=device)
    step = _step(num_blocks, num_outputs)
    words = torch.empty(step, _BLOCK_WORDS, num_outputs, dtype=torch.int16, device=device)
    bits = torch.empty_like(words)
    values = torch.empty_like(words, dtype=torch.float32)
    has_large = device.type != "cpu" or int(scales.max()) > _LARGEST
    for begin in range(0, num_blocks, step):
        end = min(begin + step, num_blocks)
        word, bit, value = words[: end - begin], bits[: end - begin], values[: end - begin]
        _fill(word, blocks[:, begin:end])
        exponent = scales[:, begin:end].t().contiguous().to(torch.int32)[:, None]
        factor = _power(exponent.clamp(max=_LARGEST).add_(14))
        rest = None
        if has_large:
            rest = _power(exponent.clamp(min=_LARGEST).add_(127 - _LARGEST))
        for place in (3, 2, 1, 0):  # the number in the highest bits, then the one that follows
            torch.bitwise_right_shift(word, 3, out=bit)
            bit &= _SIGN_AND_NUMBER
            value.copy_(bit.view(torch.float16))
            value *= factor
            if rest is not None:
                value *= rest
            out[begin:end, :, place] = value
            word <<= 4
        del exponent, factor, rest  # before the next ones are made
    return out.view(num_blocks * BLOCK, num_outputs)


def _fill(words: Tensor, blocks: Tensor) -> None:
    """`blocks` [O, G, 16] as `words` [G, 8, O] of two bytes each."""
    import torch

    if blocks.storage_offset() % 2 == 0:
        words.copy_(blocks.view(torch.int16).permute(1, 2, 0))
    else:
        pairs = words.view(torch.uint8).unflatten(-1, (-1, 2))  # [G, 8, O, 2]
        pairs.copy_(blocks.unflatten(-1, (-1, 2)).permute(1, 2, 0, 3))


def _power(exponent: Tensor) -> Tensor:
    """float32 with these exponents as they are stored, in the place of the int32 `exponent`."""
    import torch

    return exponent.bitwise_left_shift_(23).view(torch.float32)


def _step(num_blocks: int, num_outputs: int) -> int:
    """Blocks of each output that are decoded at once: never more than half, to take less on the way
    than for the result.
    """
    return min(max(_CHUNK_NUMBERS // (BLOCK * num_outputs), 1), (num_blocks + 1) // 2)


def _scratch_bytes(num_blocks: int, num_outputs: int) -> int:
    one = _BLOCK_WORDS * _BYTES_PER_WORD + _BYTES_PER_SCALE
    return _step(num_blocks, num_outputs) * num_outputs * one
