"""Weight codecs that decode rows alone, with one fault each in that."""

from __future__ import annotations

from dataclasses import replace

import torch
from broken import BrokenPart
from turned_codec import TurnedRows, suite_of

from ollm_conformance.parts.encoded import DTYPES


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


BROKEN_CODEC_ROWS = [
    BrokenPart(name, fault, suite, f"codec.{check}")
    for name, fault, suite, check in [
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
    ]
]  # fmt: skip
