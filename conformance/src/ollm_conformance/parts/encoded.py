"""Tensors that a weight codec is tried with, and what it makes of a checkpoint that holds them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ollm_conformance.seeds import drawn
from ollm_core import CodecRequest, Config, EncodedTensor, TensorInfo
from ollm_core.testing import open_checkpoint

WeightCodec = Callable[[CodecRequest], Mapping[str, EncodedTensor]]
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
CONFIG: dict[str, Any] = {"model_type": "llama", "vocab_size": 64}
SHAPES: tuple[tuple[int, ...], ...] = (
    (), (0,), (1,), (2,), (3,), (1, 1), (7, 5), (64, 64), (0, 4), (4, 0), (2, 3, 5), (129, 257),
)  # fmt: skip
PLAIN_FILE = "model.safetensors"


def patterns(dtype: torch.dtype) -> Tensor:
    """Every pattern of bits of a dtype of two bytes, and of one of four those that a codec could
    lose: both zeros, subnormals, infinities and NaNs with any payload; [N].
    """
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32)
    if dtype.itemsize == 2:
        return every.to(torch.int16).view(dtype)
    low = torch.tensor([0, 1, 0x7FFF, 0x8000, 0xFFFF], dtype=torch.int32)
    return ((every[::7, None] << 16) | low).flatten().view(dtype)


def weights(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> Tensor:
    """Random numbers as weights are."""
    generator = drawn(seed)
    return (torch.randn(shape, generator=generator) * 0.02).to(dtype)


def bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, [N]."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def same_pattern(found: Tensor, expected: Tensor, what: str) -> None:
    """Raises AssertionError unless both are of one dtype and shape and all their bits are equal,
    those of NaNs too.
    """
    form = f"{expected.dtype} {list(expected.shape)}"
    got = f"{found.dtype} {list(found.shape)}"
    assert got == form, f"{what}: expected {form}, got {got}"
    wrong = (bits(found) != bits(expected)).nonzero()
    if len(wrong):
        place = int(wrong[0]) // expected.element_size()
        size = expected.element_size()
        words = [
            bytes(bits(t)[place * size : (place + 1) * size].tolist())[::-1].hex()
            for t in (expected, found)
        ]
        raise AssertionError(
            f"{what}: {len(wrong)} of {bits(expected).numel()} bytes differ, the first in element "
            f"{place}: expected the bits {words[0]}, got {words[1]}"
        )


def decoded(encoded: EncodedTensor, arguments: Sequence[Tensor], what: str) -> Tensor:
    """What `decode` makes. Raises AssertionError for anything but a tensor."""
    try:
        found = encoded.decode(*arguments)
    except Exception as error:
        raise AssertionError(f"{what}: expected a tensor, got {error!r}") from error
    assert isinstance(found, Tensor), f"{what}: expected a tensor, got {found!r:.60}"
    return found


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """A checkpoint, and what a codec says of it."""

    directory: Path
    request: CodecRequest
    tensors: Mapping[str, Tensor]
    """Every stored tensor, by name."""
    encoded: Mapping[str, EncodedTensor]

    @classmethod
    def open(cls, directory: Path, codec: WeightCodec, config: Config) -> Stored:
        """Ask the codec about the checkpoint in a directory; `config` goes into its config.json."""
        request = cls.request_of(directory, config)
        files = map(load_file, request.metadata)
        tensors = {name: t.clone() for file in files for name, t in file.items()}  # no maps
        return cls(directory, request, tensors, codec(request))

    @staticmethod
    def request_of(directory: Path, config: Config) -> CodecRequest:
        """What a codec is told of the checkpoint in a directory."""
        checkpoint = open_checkpoint(directory)
        return CodecRequest({**CONFIG, **config}, checkpoint.tensors, checkpoint.metadata)

    def arguments(self, name: str) -> list[Tensor]:
        """What `decode` of a logical tensor is given."""
        return [self.tensors[stored] for stored in self.encoded[name].tensors]

    def decode(self, name: str, what: str) -> Tensor:
        """The tensor of a name. Raises AssertionError for anything but a tensor."""
        return decoded(self.encoded[name], self.arguments(name), what)

    def without(self, stored: str) -> CodecRequest:
        """The request of a checkpoint that lacks one stored tensor."""
        tensors = {name: info for name, info in self.request.tensors.items() if name != stored}
        return replace(self.request, tensors=tensors)

    def changed(self, stored: str, **fields: Any) -> CodecRequest:
        """The request of a checkpoint whose header says something else of one stored tensor."""
        info: TensorInfo = replace(self.request.tensors[stored], **fields)
        return replace(self.request, tensors={**self.request.tensors, stored: info})


@contextmanager
def plain(tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> Iterator[Path]:
    """A checkpoint that no codec has written."""
    with tempfile.TemporaryDirectory() as name:
        copies = {key: tensor.clone() for key, tensor in tensors.items()}  # none shares memory
        save_file(copies, Path(name, PLAIN_FILE), metadata)
        yield Path(name)
