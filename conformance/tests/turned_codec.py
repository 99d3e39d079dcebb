"""A good codec, which turns all bits around and has checksums: whole, and by rows. Broken ones are
made of it.
"""

from __future__ import annotations

import json
import zlib
from contextlib import contextmanager
from dataclasses import replace

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from ollm_conformance import CodecConformance
from ollm_conformance.parts.encoded import DTYPES
from ollm_core import CheckpointError, EncodedTensor

KEY = "turned"
"""In the metadata: JSON of the dtype and the shape of each tensor."""


def sum_of(raw):
    """The checksum of bytes."""
    return zlib.crc32(raw.contiguous().numpy()).to_bytes(4, "little")


class Turned:
    """NAME is stored as NAME.turned, its bytes with all bits turned around, and NAME.sum."""

    def __call__(self, request):
        found = {}
        for path, metadata in request.metadata.items():
            for name, (dtype, shape) in json.loads(metadata.get(KEY, "{}")).items():
                self.check(request, name, path)
                found[self.named(name)] = self.encoded(name, dtype, tuple(shape))
        return found

    def named(self, name):
        """What a tensor is called."""
        return name

    def check(self, request, name, path):
        """Raises CheckpointError unless a tensor is there in two parts."""
        for part in (f"{name}.turned", f"{name}.sum"):
            info = request.tensors.get(part)
            odd = part.endswith("sum") and info is not None and info.shape[-1:] != (4,)
            if info is None or info.dtype != "U8" or odd:
                raise CheckpointError(f"{path}: {part} is missing or of another form")
            if info.num_bytes == 0 and name == "layer":
                raise CheckpointError(f"{path}: {part} is empty")

    def encoded(self, name, dtype, shape, **fields):
        """What is told of one tensor."""

        def decode(turned, checksum):
            self.verify(name, turned, checksum)
            return self.decode(turned, DTYPES[dtype], shape)

        return EncodedTensor((f"{name}.turned", f"{name}.sum"), dtype, shape, decode, **fields)

    def verify(self, name, turned, checksum):
        """Raises CheckpointError for damaged bytes."""
        if sum_of(turned) != bytes(checksum.tolist()):
            raise CheckpointError(f"{name} cannot be decoded: its bytes are damaged")

    def decode(self, turned, dtype, shape):
        """The tensor."""
        return self.finish(torch.bitwise_not(turned).view(dtype).view(shape))

    def finish(self, value):
        """What is given out for a tensor that is decoded."""
        return value


def turn(tensors, directory, kept=False, rows=False):
    """Write a checkpoint in this form; with `kept` no bit is turned, with `rows` each row is one of
    bytes.
    """
    stored, told = {}, {}
    names = {dtype: name for name, dtype in DTYPES.items()}
    for name, tensor in tensors.items():
        raw = tensor.contiguous().view(-1).view(torch.uint8)
        raw = raw.clone() if kept else torch.bitwise_not(raw)
        sums = list(sum_of(raw))
        if rows and _has_rows(tensor.shape):
            raw = raw.view(tensor.shape[0], -1)
            sums = [list(sum_of(one)) for one in raw]
        stored[f"{name}.turned"] = raw
        stored[f"{name}.sum"] = torch.tensor(sums, dtype=torch.uint8)
        told[name] = names[tensor.dtype], list(tensor.shape)
    save_file(stored, directory / "model.safetensors", {KEY: json.dumps(told)})


def _has_rows(shape):
    return len(shape) > 1 and 0 not in shape


def _rows(raw):
    """[rows, bytes], of one row alone too."""
    return raw if raw.dim() > 1 else raw[None]


def suite_of(codec_, kept=False, rows=False, **attributes):
    """The suite for a codec."""

    class Suite(CodecConformance):
        codec = codec_()
        dtypes = ("BF16", "F32")
        edges = (1000,)

        @classmethod
        def write(cls, tensors, directory):
            turn(tensors, directory, kept, rows)

        @classmethod
        def is_checked(cls, stored):
            return True

        @classmethod
        @contextmanager
        def models(cls):
            torch.manual_seed(0)
            sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
            config = LlamaConfig(vocab_size=64, num_attention_heads=2, **sizes)
            plain, packed = (LlamaForCausalLM(config).bfloat16().eval() for _ in range(2))
            with cls.stored(plain.state_dict()) as stored:
                made = {name: stored.decode(name, name) for name in stored.encoded}
            packed.load_state_dict(made, strict=False)
            yield plain, packed

    for name, value in attributes.items():
        setattr(Suite, name, value)
    return Suite


class TurnedRows(Turned):
    """Each row of a tensor of several dimensions has bytes and a checksum of its own, and can be
    decoded alone.
    """

    def encoded(self, name, dtype, shape, **fields):
        whole = super().encoded(name, dtype, shape, **fields)
        if not _has_rows(shape):
            return whole

        def decode(turned, checksum):
            self.verify(name, turned, checksum)
            return self.row(turned, DTYPES[dtype], shape[1:])

        row = EncodedTensor(whole.tensors, dtype, shape[1:], decode)
        return replace(whole, row=self.told(row))

    def verify(self, name, turned, checksum):
        for raw, one in zip(_rows(turned), _rows(checksum), strict=True):
            super().verify(name, raw, one)

    def decode(self, turned, dtype, shape):
        return super().decode(turned.view(-1), dtype, shape)

    def row(self, turned, dtype, shape):
        """One row."""
        return torch.bitwise_not(turned).view(-1).view(dtype).view(shape)

    def told(self, row):
        """What is told of a row."""
        return row


GOOD_CODECS = [suite_of(Turned), suite_of(TurnedRows, rows=True)]
