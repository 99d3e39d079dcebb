"""Weight codecs with one fault each in what they claim, or make of whole tensors."""

from __future__ import annotations

import time

import numpy as np
import torch
from broken import BrokenPart
from turned_codec import Turned, suite_of

from ollm_core import CheckpointError, EncodedTensor


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


class LastOneKept(Turned):
    """A small tensor that lies where the last one did is taken for that."""

    def __init__(self):
        self.last = None, None

    def decode(self, turned, dtype, shape):
        place = turned.data_ptr(), dtype, shape
        if turned.numel() > 20_000:
            return super().decode(turned, dtype, shape)
        if place != self.last[0]:
            self.last = place, super().decode(turned, dtype, shape)
        return self.last[1].clone()


class RefusedForEver(Turned):
    """A name that was damaged once is refused from then on."""

    def __init__(self):
        self.refused = set()

    def verify(self, name, turned, checksum):
        if name in self.refused:
            raise CheckpointError(f"{name} cannot be decoded: its bytes are damaged")
        try:
            super().verify(name, turned, checksum)
        except CheckpointError:
            self.refused.add(name)
            raise


class SumTakenOnce(Turned):
    """A tensor whose checksum was right is not looked at again."""

    def __init__(self):
        self.sound = set()

    def verify(self, name, turned, checksum):
        if name not in self.sound:
            super().verify(name, turned, checksum)
            self.sound.add(name)


class GradientsOff(Turned):
    """Whoever comes after a codec computes without gradients."""

    def decode(self, turned, dtype, shape):
        torch.set_grad_enabled(False)
        return super().decode(turned, dtype, shape)


class ColumnByColumn(Turned):
    """A matrix lies in memory as its transposed one does."""

    def finish(self, value):
        return value.t().contiguous().t() if value.ndim == 2 else value


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
        ("gradients-off", "torch's mode of gradients is left switched off.",
         suite_of(GradientsOff), "process"),
        ("column-by-column", "Matrices lie column by column.",
         suite_of(ColumnByColumn), "declared"),
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
        ("last-one-kept", "Bytes that lie where the last ones did are taken for those.",
         suite_of(LastOneKept), "walk"),
        ("refused-for-ever", "What was damaged once is refused from then on.",
         suite_of(RefusedForEver), "walk"),
        ("sum-taken-once", "A tensor whose checksum was right is not looked at again.",
         suite_of(SumTakenOnce), "walk"),
        ("head-renamed", "The head has another name.", suite_of(HeadRenamed), "model"),
    ]
]  # fmt: skip
