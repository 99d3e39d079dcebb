"""The built-in weight codec of MXFP4: 32 numbers of 4 bits share a power of two.

A tensor NAME [E, in, out], such as a stack of experts, is stored as `NAME_blocks`
[E, out, in / 32, 16] and `NAME_scales` [E, out, in / 32], bytes both; one without E likewise.
config.json says so, as transformers writes it. Tensors stay packed on disk, in host memory and on
their way to the device, and are made there, row by row.

No torch is imported before something is decoded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from ollm_core.contracts.model import Config
from ollm_core.contracts.tensors import DTYPE_BYTES, EncodedTensor, StoredForm, TensorInfo
from ollm_core.errors import CheckpointError
from ollm_core.plugins.factories import CodecRequest
from ollm_core.plugins.loader import Offer

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 32
"""Numbers that share a scale."""

_PACKED = ("gate_up_proj", "down_proj")  # the stacks of experts that transformers packs
_BLOCKS, _SCALES = "_blocks", "_scales"
_MIXED = "the checkpoint is half converted, or config.json is of another one"
_BLOCK_BYTES = BLOCK // 2
_BLOCK_WORDS = BLOCK // 4
_CHUNK_NUMBERS = 1 << 22  # at once: more leaves the CPU's caches, fewer take more calls
_BYTES_PER_WORD = 2 + 2 + 4  # itself, a number of its four, and that in float32
_BYTES_PER_SCALE = 4 + 4 + 4  # itself, its factor, and the rest of that
_SIGN_AND_NUMBER = -0x7200  # bits 15 and 9 to 11: as a float16, the number times 2 ** -14
_LARGEST = 240  # of the scales whose factor times 2 ** 14 is a finite float32


class Mxfp4Codec:
    """Tells packed tensors by config.json and their names, and what a checkpoint will hold."""

    def __call__(self, request: CodecRequest) -> Mapping[str, EncodedTensor]:
        """The packed tensors by name, none where config.json states another form or none.

        Raises CheckpointError where config.json and the checkpoint differ on what is packed, or
        half of a tensor is missing. Shapes and dtypes are left to `stored`.
        """
        stored = request.tensors
        packed = _packed_names(stored)
        if not _is_stated(request.config):
            if request.config.get("quantization_config") is None:
                _check_plain(stored, packed)
            return {}
        for name, info in stored.items():
            if _is_packed(name, info.shape) and name not in packed:
                raise CheckpointError(
                    f"the checkpoint lacks tensor {name}{_BLOCKS} and has {name}, config.json says "
                    "mxfp4",
                    hint=_MIXED,
                )
        return {name: _encoded(stored, name) for name in packed}

    def describe(
        self, config: Config, tensors: Mapping[str, StoredForm]
    ) -> Mapping[str, StoredForm]:
        """Blocks and scales in place of each stack of experts that can be packed."""
        if not _is_stated(config):
            return tensors
        found: dict[str, StoredForm] = {}
        for name, form in tensors.items():
            if _is_packed(name, form.shape) and form.shape[-2] % BLOCK == 0:
                names = f"{name}{_BLOCKS}", f"{name}{_SCALES}"
                found |= zip(names, _stored_forms(form.shape), strict=True)
            else:
                found[name] = form
        return found


def _is_stated(config: Config) -> bool:
    stated = config.get("quantization_config")
    return isinstance(stated, Mapping) and stated.get("quant_method") == "mxfp4"


def _is_packed(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) == 3 and name.rpartition(".")[2] in _PACKED


def _packed_names(stored: Iterable[str]) -> dict[str, None]:
    """What has blocks or scales, in order."""
    found = (
        name.removesuffix(suffix)
        for name in stored
        for suffix in (_BLOCKS, _SCALES)
        if name.endswith(suffix)
    )
    return dict.fromkeys(found)


def _check_plain(stored: Mapping[str, TensorInfo], packed: Iterable[str]) -> None:
    """Raises CheckpointError for packed stacks of experts, of which config.json says nothing."""
    for name in packed:
        parts = [stored.get(f"{name}{suffix}") for suffix in (_BLOCKS, _SCALES)]
        blocks = parts[0]
        if name in stored or blocks is None or not _is_packed(name, blocks.shape[:-1]):
            continue
        num_rows, num_outputs, num_blocks, _ = blocks.shape
        forms = _stored_forms((num_rows, num_blocks * BLOCK, num_outputs))
        if tuple(StoredForm(part.dtype, part.shape) for part in parts if part) == forms:
            raise CheckpointError(
                f"the checkpoint lacks tensor {name} and has {blocks.name}, config.json says no "
                "quantisation",
                hint=_MIXED,
            )


def _encoded(stored: Mapping[str, TensorInfo], name: str) -> EncodedTensor:
    names = f"{name}{_BLOCKS}", f"{name}{_SCALES}"
    for part in names:
        if part not in stored:
            raise CheckpointError(f"the checkpoint lacks tensor {part}", hint=_MIXED)
    blocks = stored[names[0]]
    if len(blocks.shape) not in (3, 4):
        raise CheckpointError(
            f"{blocks.path}: {blocks.name} is {blocks.dtype} {list(blocks.shape)}, expected 3 "
            "dimensions, or 4 of a stack",
            hint=_MIXED,
        )
    *stack, num_outputs, num_blocks, _ = blocks.shape
    scratch = _scratch_bytes(num_blocks, num_outputs)
    shape = num_blocks * BLOCK, num_outputs
    one = EncodedTensor(names, "BF16", shape, dequantize_mxfp4, scratch, stored=_stored_forms)
    if not stack:
        return one
    return EncodedTensor(
        names,
        "BF16",
        (*stack, *shape),
        _dequantize_stack,
        scratch + num_blocks * BLOCK * num_outputs * DTYPE_BYTES["BF16"],
        row=one,
        stored=_stored_forms,
    )


def _stored_forms(shape: tuple[int, ...]) -> tuple[StoredForm, StoredForm]:
    """Blocks and scales of a tensor [in, out], or of a stack of such."""
    *stack, num_inputs, num_outputs = shape
    scales = *stack, num_outputs, -(-num_inputs // BLOCK)
    return StoredForm("U8", (*scales, _BLOCK_BYTES)), StoredForm("U8", scales)


def _dequantize_stack(blocks: Tensor, scales: Tensor) -> Tensor:
    """`blocks` [E, O, G, 16] and `scales` [E, O, G], bytes, -> bfloat16 [E, G * 32, O]."""
    import torch

    num_rows, num_outputs, num_blocks, _ = blocks.shape
    shape = num_rows, num_blocks * BLOCK, num_outputs
    out = torch.empty(shape, dtype=torch.bfloat16, device=blocks.device)
    for i in range(num_rows):
        out[i] = dequantize_mxfp4(blocks[i], scales[i])
    return out


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
    most = _CHUNK_NUMBERS // (BLOCK * max(num_outputs, 1))
    return min(max(most, 1), (num_blocks + 1) // 2)


def _scratch_bytes(num_blocks: int, num_outputs: int) -> int:
    one = _BLOCK_WORDS * _BYTES_PER_WORD + _BYTES_PER_SCALE
    return _step(num_blocks, num_outputs) * num_outputs * one


BUILT_IN = Offer("ollm_weight_codecs", "mxfp4", Mxfp4Codec(), "oLLM itself")
"""As a plugin would offer it."""
