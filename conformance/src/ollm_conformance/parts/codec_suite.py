"""What a codec's author writes for its suite, and what the checks make of that."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ollm_conformance.parts.base import PartSuite, refusal
from ollm_conformance.parts.encoded import (
    DTYPES,
    Stored,
    WeightCodec,
    bits,
    same_pattern,
    weights,
)
from ollm_core import CodecRequest, Config, EncodedTensor, OllmError

SMALL: dict[str, tuple[int, ...]] = {
    "model.layers.0.mlp.up_proj.weight": (33, 64),
    "model.layers.1.mlp.up_proj.weight": (33, 64),
    "model.layers.1.input_layernorm.weight": (65,),
}


class CodecSuite(PartSuite):
    """How a codec is handed over; `CodecConformance` has the checks."""

    codec: ClassVar[WeightCodec]
    """The factory: a request -> the encoded tensors by name."""
    dtypes: ClassVar[Sequence[str]] = ("BF16",)
    """safetensors names of the dtypes that it encodes, of BF16, F16 and F32."""
    config: ClassVar[Config] = {}
    """What config.json says of a checkpoint in the codec's form, as `quantization_config`."""
    edges: ClassVar[Sequence[int]] = ()
    """Numbers of elements at which the form changes, as the length of a block: one less, so many
    and one more are tried.
    """

    @classmethod
    def write(cls, tensors: Mapping[str, Tensor], directory: Path) -> None:
        """Write a checkpoint of these tensors, in the codec's form, to `directory`, which is empty:
        as `model.safetensors`, or as files with an index.

        What the form cannot hold is stored as it is; of each dtype in `dtypes` it holds some.
        """
        raise NotImplementedError

    @classmethod
    def sample(cls, dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> Tensor:
        """Random numbers that the form can hold and `write` encodes. Default: such as weights are,
        of `shape`; a form that cannot hold all gives others, in a shape of about as many.
        """
        return weights(dtype, shape, seed)

    @classmethod
    def is_checked(cls, stored: str) -> bool:
        """Whether damage to one bit of the stored tensor of this name is noticed, as by a checksum.
        Default: of none.
        """
        return False

    @classmethod
    @contextmanager
    def models(cls) -> Iterator[tuple[Any, Any] | None]:
        """One model opened twice, from a plain checkpoint and from an encoded one, as `ollm.load`
        does: their logits are compared. None, the default: they are not.
        """
        yield None

    @classmethod
    @contextmanager
    def stored(cls, tensors: Mapping[str, Tensor]) -> Iterator[Stored]:
        """A checkpoint of `tensors` and what the codec says of it."""
        with tempfile.TemporaryDirectory() as name:
            cls.write(tensors, Path(name))
            yield Stored.open(Path(name), cls.codec, cls.config)

    @classmethod
    def compare(cls, tensors: Mapping[str, Tensor], what: str) -> None:
        """Raises AssertionError unless each of `tensors` comes back bit for bit, encoded or not."""
        with cls.stored(tensors) as stored:
            used = {name for encoded in stored.encoded.values() for name in encoded.tensors}
            names = (stored.tensors.keys() - used) | stored.encoded.keys()
            assert names == tensors.keys(), (
                f"{what}: expected the tensors {sorted(tensors)}, got {sorted(names)}"
            )
            for name, expected in tensors.items():
                told = f"{what}: {name}"
                encoded = name in stored.encoded
                found = stored.decode(name, told) if encoded else stored.tensors[name]
                same_pattern(found, expected, told)

    @classmethod
    def claimed(cls, request: CodecRequest, what: str) -> list[str]:
        """The names that the codec claims. Raises AssertionError if it raises anything."""
        try:
            return sorted(cls.codec(request))
        except Exception as error:
            raise AssertionError(f"{what}: expected an answer, got {error!r}") from error

    @classmethod
    def small(cls, dtype: str) -> dict[str, Tensor]:
        """A few tensors with names of models."""
        return {
            name: cls.sample(DTYPES[dtype], shape, i)
            for i, (name, shape) in enumerate(SMALL.items())
        }

    @classmethod
    def damage(cls, stored: Stored, name: str) -> None:
        """Flip a bit of a stored tensor in several places, and fill it with zeros."""
        encoded, whole = stored.encoded["layer"], stored.tensors[name]
        count = bits(whole).numel()
        for place in (0, 5, 9, count // 3, count // 2, count - 70, None):
            changed = bits(whole).clone()
            if place is None:
                changed.zero_()
            elif 0 <= place < count:
                changed[place] ^= 0x10
            else:
                continue
            arguments = [
                changed.view(whole.dtype).view(whole.shape) if one == name else stored.tensors[one]
                for one in encoded.tensors
            ]
            what = f"{name} of zeros" if place is None else f"{name} with another bit in {place}"
            if cls.is_checked(name):
                refusal(OllmError, partial(encoded.decode, *arguments), what)
            else:
                _decoded_or_refused(encoded, arguments, what)


def _decoded_or_refused(encoded: EncodedTensor, arguments: Sequence[Tensor], what: str) -> None:
    """Raises AssertionError unless there is a tensor as declared, or a refusal in one line."""
    try:
        found = encoded.decode(*arguments)
    except OllmError as error:
        found = None
        line = str(error)
        assert "\n" not in line, f"{what}: expected one line, got {line}"
    except Exception as error:
        raise AssertionError(f"{what}: expected an OllmError, got {error!r}") from error
    if found is not None:
        form, got = encoded.shape, tuple(found.shape)
        assert got == form, f"{what}: expected shape {form} as declared, got {got}"
