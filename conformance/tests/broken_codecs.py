"""Weight codecs with one fault each, on top of one that turns all bits around and has checksums."""

from __future__ import annotations

import json
import time
import zlib
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from broken import BrokenPart
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


class RowThroughFloat16(TurnedRows):
    def row(self, turned, dtype, shape):
        return super().row(turned, dtype, shape).half().to(dtype)


class FirstRowAlways(TurnedRows):
    """The row that was decoded first is given for each other of its size."""

    def __init__(self):
        self.rows = {}

    def row(self, turned, dtype, shape):
        made = super().row(turned, dtype, shape)
        return self.rows.setdefault((dtype, shape), made).clone()


class RowHasAllDimensions(TurnedRows):
    def row(self, turned, dtype, shape):
        return super().row(turned, dtype, shape)[None]

    def told(self, row):
        return replace(row, shape=(1, *row.shape))


class RowOfAnotherTensor(TurnedRows):
    def told(self, row):
        def decode(turned):
            return torch.bitwise_not(turned).view(DTYPES[row.dtype]).view(row.shape)

        return replace(row, tensors=row.tensors[:1], decode=decode)


class RowCopiedWide(TurnedRows):
    """Says nothing of a copy that is eight times as large."""

    def row(self, turned, dtype, shape):
        wide = turned.to(torch.int64)
        return super().row(wide.to(torch.uint8), dtype, shape)


class RowInPlace(TurnedRows):
    def row(self, turned, dtype, shape):
        made = super().row(turned, dtype, shape)
        turned.zero_()
        return made


class ThroughFloat32(Turned):
    def finish(self, value):
        return value.float().to(value.dtype) if value.dtype == torch.bfloat16 else value


class NoMinusZero(Turned):
    def finish(self, value):
        return value + 0.0


class SubnormalsFlushed(Turned):
    def finish(self, value):
        return torch.where(value.abs() < torch.finfo(value.dtype).tiny, 0, value)


class OddSizes(Turned):
    def finish(self, value):
        if value.numel() % 2:
            value.view(-1)[-1] = 0
        return value


class ScalarsAreVectors(Turned):
    def finish(self, value):
        return value if value.ndim else value[None]


class FirstBlockOnly(Turned):
    def finish(self, value):
        value.view(-1)[1000:1001] = 0
        return value


class FlatShape(Turned):
    def __call__(self, request):
        found = super().__call__(request)
        return {
            name: self.encoded_flat(one) if len(one.shape) > 1 else one
            for name, one in found.items()
        }

    def encoded_flat(self, one):
        count = torch.Size(one.shape).numel()
        return EncodedTensor(one.tensors, one.dtype, (count,), one.decode)


class EndlessSeconds(Turned):
    def encoded(self, *arguments):
        return super().encoded(*arguments, decode_seconds=float("inf"))


class InPlace(Turned):
    def decode(self, turned, dtype, shape):
        return turned.bitwise_not_().view(dtype).view(shape)

    def verify(self, name, turned, checksum):
        pass


class ViewOfStored(Turned):
    def decode(self, turned, dtype, shape):
        return turned.view(dtype).view(shape)


class ResultKept(Turned):
    def __init__(self):
        self.results = {}

    def decode(self, turned, dtype, shape):
        place = turned.data_ptr()
        if place not in self.results:  # what is stored is kept too, that no other takes its place
            self.results[place] = turned, super().decode(turned, dtype, shape)
        return self.results[place][1]


class OneBuffer(Turned):
    def __init__(self):
        self.buffer = torch.empty(1 << 26, dtype=torch.uint8)

    def decode(self, turned, dtype, shape):
        part = self.buffer[: turned.numel()].copy_(turned)
        return part.bitwise_not_().view(dtype).view(shape)


class SharedScratch(Turned):
    """Half of the bytes go through a buffer that all threads have."""

    def __init__(self):
        self.buffer = torch.empty(1 << 26, dtype=torch.uint8)

    def decode(self, turned, dtype, shape):
        part = self.buffer[: turned.numel()].copy_(turned)
        time.sleep(0.001)
        return super().decode(part, dtype, shape)


class AnyBytes(Turned):
    def __call__(self, request):
        found = super().__call__(request)
        for name, info in request.tensors.items():
            if not found and info.dtype == "U8":
                found[name] = EncodedTensor((name,), "U8", info.shape, torch.bitwise_not)
        return found


class ByNameAlone(Turned):
    def __call__(self, request):
        found = super().__call__(request)
        for name, info in request.tensors.items():
            if not found and name.endswith("_blocks"):
                found[name.removesuffix("_blocks")] = self.encoded(name, "BF16", info.shape)
        return found


class ReadsTheFiles(Turned):
    def __call__(self, request):
        for path in request.metadata:
            path.read_bytes()
        return super().__call__(request)


class NoMetadataExpected(Turned):
    def __call__(self, request):
        next(iter(request.metadata))
        return super().__call__(request)


class CopyInNumpy(Turned):
    """Says nothing of a copy that is twice as large."""

    def decode(self, turned, dtype, shape):
        wide = turned.numpy().astype(np.int16)
        return torch.from_numpy((~wide).astype(np.uint8)).view(dtype).view(shape)


class KeepsBytes(Turned):
    def __init__(self):
        self.kept = []

    def decode(self, turned, dtype, shape):
        self.kept.append(turned.numpy().tobytes())
        return super().decode(turned, dtype, shape)


class SumIgnored(Turned):
    def verify(self, name, turned, checksum):
        pass


class SumOfTheBeginning(Turned):
    def verify(self, name, turned, checksum):
        if turned.numel() < 1000 or turned[:1000].sum() < 20_000:
            super().verify(name, turned, checksum)


class RawDamage(Turned):
    def verify(self, name, turned, checksum):
        try:
            super().verify(name, turned, checksum)
        except CheckpointError as error:
            raise ValueError(str(error)) from error


class ManyLines(Turned):
    def verify(self, name, turned, checksum):
        try:
            super().verify(name, turned, checksum)
        except CheckpointError as error:
            raise CheckpointError(f"{error}\nsee above") from error


class MissingPart(Turned):
    def check(self, request, name, path):
        request.tensors[f"{name}.turned"]


class HeadRenamed(Turned):
    def named(self, name):
        return name.replace("lm_head", "head")


BROKEN_CODECS = [
    BrokenPart(name, fault, suite, f"codec.{check}")
    for name, fault, suite, check in [
        ("through-float32", "NaNs lose their payload on the way through float32.",
         suite_of(ThroughFloat32), "patterns"),
        ("no-minus-zero", "Minus zero becomes zero.", suite_of(NoMinusZero), "patterns"),
        ("subnormals-flushed", "Subnormal numbers become zero.",
         suite_of(SubnormalsFlushed), "patterns"),
        ("odd-sizes", "The last element is lost where their number is odd.",
         suite_of(OddSizes), "shapes"),
        ("scalars-are-vectors", "A tensor without dimensions gets one.",
         suite_of(ScalarsAreVectors), "shapes"),
        ("after-a-block", "The element after the first block is lost.",
         suite_of(FirstBlockOnly), "shapes"),
        ("flat-shape", "The shape that is told is flat.", suite_of(FlatShape), "declared"),
        ("endless-seconds", "Decoding is said to take for ever.",
         suite_of(EndlessSeconds), "declared"),
        ("in-place", "The stored bytes are turned in place.", suite_of(InPlace), "new-tensor"),
        ("view-of-stored", "The result is a view of the stored bytes.",
         suite_of(ViewOfStored, kept=True), "new-tensor"),
        ("result-kept", "A second call gives the tensor of the first.",
         suite_of(ResultKept), "new-tensor"),
        ("one-buffer", "All results are in one buffer.", suite_of(OneBuffer), "new-tensor"),
        ("shared-scratch", "Threads share a buffer without a lock.",
         suite_of(SharedScratch), "threads"),
        ("any-bytes", "Tensors of bytes are claimed in any checkpoint.",
         suite_of(AnyBytes), "foreign"),
        ("by-name-alone", "Names decide what is claimed, whoever wrote the checkpoint.",
         suite_of(ByNameAlone), "foreign"),
        ("reads-the-files", "The factory reads the files.", suite_of(ReadsTheFiles), "foreign"),
        ("no-files", "A checkpoint without files is not expected.",
         suite_of(NoMetadataExpected), "foreign"),
        ("copy-in-numpy", "A copy in numpy is in no scratch_bytes.",
         suite_of(CopyInNumpy), "memory"),
        ("keeps-bytes", "The bytes of each call are kept.", suite_of(KeepsBytes), "memory"),
        ("results-cached", "Results are kept for the next pass.", suite_of(ResultKept), "memory"),
        ("sum-ignored", "Checksums are not looked at.", suite_of(SumIgnored), "damage"),
        ("sum-of-the-beginning", "Damage behind the first bytes is not noticed.",
         suite_of(SumOfTheBeginning), "damage"),
        ("raw-damage", "Damage is a ValueError.", suite_of(RawDamage), "damage"),
        ("many-lines", "Damage is told in two lines.", suite_of(ManyLines), "damage"),
        ("missing-part", "A part that is missing is a KeyError.", suite_of(MissingPart), "damage"),
        ("row-through-float16", "A row goes through float16, the whole does not.",
         suite_of(RowThroughFloat16, rows=True), "rows"),
        ("first-row-always", "Every row is the one that was asked for first.",
         suite_of(FirstRowAlways, rows=True), "rows"),
        ("row-has-all-dimensions", "A row keeps its first dimension.",
         suite_of(RowHasAllDimensions, rows=True), "rows"),
        ("row-of-another-tensor", "A row is made of fewer tensors than the whole.",
         suite_of(RowOfAnotherTensor, rows=True), "rows"),
        ("row-copied-wide", "A copy of a row is in no scratch_bytes.",
         suite_of(RowCopiedWide, rows=True), "row-memory"),
        ("row-in-place", "The stored bytes of a row are used up.",
         suite_of(RowInPlace, rows=True), "row-memory"),
        ("head-renamed", "The head has another name.", suite_of(HeadRenamed), "model"),
    ]
]  # fmt: skip

GOOD_CODECS = [suite_of(Turned), suite_of(TurnedRows, rows=True)]
