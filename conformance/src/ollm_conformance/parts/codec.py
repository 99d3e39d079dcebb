"""The contract of a weight codec."""

from __future__ import annotations

import math
import random
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import torch
from torch import Tensor

from ollm_conformance.checks import check, does_not_apply
from ollm_conformance.compare import same_bits
from ollm_conformance.parts.base import process_as_it_was
from ollm_conformance.parts.codec_suite import SMALL, CodecSuite
from ollm_conformance.parts.codec_walk import CodecWalk
from ollm_conformance.parts.encoded import (
    DTYPES,
    SHAPES,
    Stored,
    WeightCodec,
    decoded,
    patterns,
    plain,
    same_pattern,
    weights,
)
from ollm_conformance.process_memory import every_time, expect, peak_grown, process_memory
from ollm_conformance.seeds import drawn, run_seed
from ollm_core import CodecRequest, EncodedTensor, OllmError, StoredForm

LARGE = 3072, 4096
"""Shape of a tensor beside which everything else in the process is small."""
LARGE_ROWS = 2, 3072, 2048
"""Shape of one whose rows are so too."""


class CodecConformance(CodecSuite):
    """Every check of a weight codec. Subclass it as `TestX`, set `codec` to what the hook
    `ollm_weight_codecs` offers, and write `write`, which encodes.
    """

    @check(
        "codec.patterns",
        "Every pattern of bits comes back: both zeros, subnormals, infinities, NaNs with their "
        "payloads.",
        look="decode: work on bits; arithmetic and conversions change some of them",
    )
    def test_patterns(self) -> None:
        for name in self.dtypes:
            every = patterns(DTYPES[name])
            mixed = every[torch.randperm(len(every), generator=drawn(1))]
            self.compare({"every": every, "mixed": mixed[: len(mixed) // 8 * 8].view(8, -1)}, name)

    @check(
        "codec.shapes",
        "Tensors of any shape come back bit for bit: empty ones, single numbers, odd sizes, and "
        "those around the length of a block.",
        look="decode: what is left over when a size is divided; `edges` says where blocks end",
    )
    def test_shapes(self) -> None:
        sizes = [edge + more for edge in self.edges for more in (-1, 0, 1)]
        for name in self.dtypes:
            shapes = [*SHAPES, *((size,) for size in sizes if size > 0)]
            tensors = {
                f"{i} {list(shape)}": weights(DTYPES[name], shape, i)
                for i, shape in enumerate(shapes)
            }
            self.compare(tensors, name)

    @check(
        "codec.declared",
        "Dtype and shape are those of what is returned, the rest is what it can be, and each dtype "
        "that is told is encoded.",
        look="the fields of EncodedTensor",
    )
    def test_declared(self) -> None:
        for name in self.dtypes:
            with self.stored(self.small(name)) as stored:
                assert stored.encoded, f"{name}: expected some tensors encoded, got none"
                for tensor, encoded in stored.encoded.items():
                    told = f"{name} {tensor}"
                    _check_fields(encoded, stored.tensors.keys(), told)
                    found = stored.decode(tensor, told)
                    assert found.is_contiguous(), (
                        f"{told}: expected a tensor in one piece, row by row, got strides "
                        f"{found.stride()}"
                    )
                    form = encoded.dtype, encoded.shape
                    got = _name_of(found.dtype), tuple(found.shape)
                    assert got == form, f"{told}: expected {form} as declared, got {got}"

    @check(
        "codec.new-tensor",
        "Each call gives a new tensor, which shares no memory with another result or the stored "
        "bytes, and those stay as they were.",
        look="decode: views of its arguments, work in place, results that are kept",
    )
    def test_new_tensor(self) -> None:
        for name in self.dtypes:
            originals = self.small(name)
            with self.stored(originals) as stored:
                for tensor in stored.encoded:
                    before = [t.clone() for t in stored.arguments(tensor)]
                    first = stored.decode(tensor, f"{tensor}, the first time")
                    second = stored.decode(tensor, f"{tensor}, the second time")
                    for time, other in (("first", first), ("second", second)):
                        told = f"{name} {tensor}, the {time} result"
                        same_pattern(other, originals[tensor], told)
                        bits_of = other.detach().view(-1).view(torch.uint8)
                        bits_of.bitwise_xor_(0xFF)
                        for one, kept in zip(stored.arguments(tensor), before, strict=True):
                            same_pattern(one, kept, f"{told} was changed: a stored tensor then")
                    assert first.data_ptr() != second.data_ptr(), (
                        f"{name} {tensor}: expected two tensors of two calls, got one"
                    )
                    third = stored.decode(tensor, tensor)
                    told = f"{name} {tensor}, after other results were changed"
                    same_pattern(third, originals[tensor], told)

    @check(
        "codec.threads",
        "Several threads can decode at once, the same tensor or others.",
        look="decode: buffers and decoders that calls share",
    )
    def test_threads(self) -> None:
        originals = {
            f"layer.{i}": self.sample(DTYPES[name], (200 + i, 257), i)
            for name in self.dtypes
            for i in range(4)
        }
        with self.stored(originals) as stored, ThreadPoolExecutor(4) as pool:
            names = [*stored.encoded] * 8
            found = pool.map(lambda name: stored.decode(name, f"{name}, beside others"), names)
            for name, value in zip(names, found, strict=True):
                same_pattern(value, originals[name], f"{name}, beside others")

    @check(
        "codec.process",
        "To be asked and to decode, soundly or not, leaves torch's threads, random numbers and "
        "modes, and the process's environment as they were.",
        look="decode: set nothing that others share, or put it back, also after an error",
    )
    def test_process(self) -> None:
        for name in self.dtypes:
            with self.stored(self.small(name)) as stored, process_as_it_was(f"{name}, decoding"):
                self.claimed(stored.request, "asked again")
                for tensor, encoded in stored.encoded.items():
                    stored.decode(tensor, tensor)
                    damaged = [torch.zeros_like(one) for one in stored.arguments(tensor)]
                    with suppress(Exception):
                        encoded.decode(*damaged)

    @check(
        "codec.foreign",
        "Of checkpoints that are not in its form it claims nothing, and of those that are only "
        "what they hold, from names, dtypes, shapes and metadata alone.",
        look="the factory: it is asked about every checkpoint, and the files need not be there",
    )
    def test_foreign(self) -> None:
        eight = torch.arange(64, dtype=torch.uint8).view(8, 8)
        originals = self.small(self.dtypes[0])
        foreign: dict[str, dict[str, Tensor]] = {
            "the same tensors": originals,
            "packed blocks": {"a.weight_blocks": eight, "a.weight_scales": eight[0]},
            "quantised tensors": {
                "a.qweight": eight.view(torch.int32), "a.scales": originals[next(iter(SMALL))],
            },
            "bytes": {name: eight for name in originals},
            "one number": {"model.step": torch.tensor(3)},
        }  # fmt: skip
        for what, tensors in foreign.items():
            for metadata in ({}, {"format": "pt"}):
                with plain(tensors, metadata) as directory:
                    claimed = self.claimed(Stored.request_of(directory, {}), what)
                    assert not claimed, f"{what}: expected nothing claimed, got {claimed}"
        claimed = self.claimed(CodecRequest({}, {}, {}), "no tensors")
        assert not claimed, f"no tensors: expected nothing claimed, got {claimed}"
        with self.stored(originals) as stored:
            found = sorted(stored.encoded)
        again = self.claimed(stored.request, "when files are gone")
        assert again == found, f"when files are gone: expected {found} claimed, got {again}"

    @check(
        "codec.memory",
        "`decode` takes the memory of its result and scratch_bytes, whatever it is made with, and "
        "afterwards the process holds the result alone.",
        look="scratch_bytes; copies in numpy, bytes and libraries count; results that are kept",
    )
    @every_time
    def test_memory(self) -> None:
        dtype = DTYPES[self.dtypes[0]]
        name, original = "large", self.sample(dtype, LARGE, 0)
        with self.stored({name: original, "other": self.sample(dtype, (64, 64), 1)}) as stored:
            if "other" in stored.encoded:
                stored.decode("other", "other")  # what is made once is made here
            if name not in stored.encoded:
                does_not_apply("it leaves a tensor of many random numbers as it is")
            with process_memory() as memory:
                result = original.numel() * original.element_size()
                most = result + stored.encoded[name].scratch_bytes
                made: list[Tensor] = []
                peak = peak_grown(lambda: made.append(stored.decode(name, name)))
                if peak is not None:
                    expect(peak, most, "decode", "the result and scratch_bytes")
                memory.expect(result, "after decode", "the result")
                same_pattern(made[0], original, f"the sample of {list(LARGE)}")
                made.clear()
                for _ in range(2):
                    stored.decode(name, name)
                memory.expect(0, "when the results are gone", "as before decode")

    @check(
        "codec.rows",
        "Where it is said how one row is decoded, each row decoded alone is that row of the whole, "
        "bit for bit, whichever was decoded before it.",
        look="`row` of EncodedTensor: its tensors, dtype and shape, and its decode",
    )
    def test_rows(self) -> None:
        for name in self.dtypes:
            originals = self.small(name)
            with self.stored(originals) as stored:
                for tensor, row in _rows_of(stored).items():
                    whole = stored.encoded[tensor]
                    told = f"{name} {tensor}, `row`"
                    _check_fields(row, stored.tensors.keys(), told)
                    form = whole.tensors, whole.dtype, whole.shape[1:], None
                    got = row.tensors, row.dtype, row.shape, row.row
                    assert got == form, f"{told}: expected {form}, got {got}"
                    for i in (*reversed(range(whole.shape[0])), 0):
                        what = f"{name} {tensor}, row {i}"
                        arguments = [one[i] for one in stored.arguments(tensor)]
                        same_pattern(decoded(row, arguments, what), originals[tensor][i], what)

    @check(
        "codec.row-memory",
        "To decode one row takes the memory of that row and its own scratch_bytes, not that of the "
        "whole, and leaves the stored bytes as they were.",
        look="scratch_bytes of `row`; work in place on what its decode is given",
    )
    @every_time
    def test_row_memory(self) -> None:
        original = self.sample(DTYPES[self.dtypes[0]], LARGE_ROWS, 0)
        with self.stored({"large": original}) as stored:
            row = _rows_of(stored)["large"]
            arguments = [one[-1] for one in stored.arguments("large")]
            before = [one.clone() for one in arguments]
            same_pattern(decoded(row, arguments, "a row"), original[-1], "the last row")
            for one, kept in zip(arguments, before, strict=True):
                same_pattern(one, kept, "a stored tensor after its row was decoded")
            result = original[-1].numel() * original.element_size()
            with process_memory() as memory:
                made: list[Tensor] = []
                peak = peak_grown(lambda: made.append(decoded(row, arguments, "a row")))
                if peak is not None:
                    most = result + row.scratch_bytes
                    expect(peak, most, "decode of a row", "the row and its scratch_bytes")
                memory.expect(result, "after decode of a row", "the row")

    @check(
        "codec.damage",
        "Stored tensors that are damaged, missing or of another form are refused in one line, or "
        "left alone; a damaged bit that the form can tell never becomes other numbers.",
        look="raise CheckpointError, in the factory for what a header shows, else in decode",
    )
    def test_damage(self) -> None:
        dtype = DTYPES[self.dtypes[0]]
        with self.stored({"layer": self.sample(dtype, (160, 129), 3)}) as stored:
            assert "layer" in stored.encoded, "expected its sample encoded, got it plain"
            for name in stored.encoded["layer"].tensors:
                self.damage(stored, name)
                info = stored.request.tensors[name]
                requests = {
                    f"without {name}": stored.without(name),
                    f"with {name} in int32": stored.changed(
                        name, dtype="I32", shape=(*info.shape[:-1], -(-info.shape[-1] // 4))
                    ),
                    f"with {name} empty": stored.changed(name, shape=(0,), num_bytes=0),
                }
                for what, request in requests.items():
                    _refused_or_left(request, type(self).codec, what)

    @check(
        "codec.walk",
        "Whatever is decoded, wholes or rows of several checkpoints, from buffers that are used "
        "again, after damage or another question, is what was written, and stays that.",
        look="state of the codec: what it keeps by name, by place or from the call before",
    )
    def test_walk(self) -> None:
        draw = random.Random(run_seed())
        for number in range(4):
            CodecWalk(type(self), draw).run(f"seed {run_seed()}, walk {number}")

    @check(
        "codec.model",
        "A model with encoded weights gives the logits of the plain one, bit for bit.",
        look="the names that the factory gives, and `decode`",
    )
    def test_model(self) -> None:
        with self.models() as models:
            if models is None:
                does_not_apply("models() gives none to compare")
            original, encoded = models
            ids = torch.arange(5, 25)[None] % original.config.vocab_size
            with torch.no_grad():
                expected, found = original(input_ids=ids), encoded(input_ids=ids)
            same_bits(found.logits, expected.logits, "logits of the encoded model")


def _check_fields(encoded: object, stored: Collection[str], what: str) -> None:
    """Raises AssertionError for a field that core could not use."""
    assert isinstance(encoded, EncodedTensor), f"{what}: expected an EncodedTensor, got {encoded!r}"
    assert encoded.tensors, f"{what}: expected stored tensors, got none"
    missing = sorted(set(encoded.tensors) - set(stored))
    assert not missing, f"{what}: expected stored tensors, got {missing}, which are not stored"
    scratch, seconds = encoded.scratch_bytes, encoded.decode_seconds
    assert type(scratch) is int and scratch >= 0, (  # noqa: PT018 - one fact
        f"{what}: expected whole bytes as scratch_bytes, got {scratch!r}"
    )
    assert math.isfinite(seconds) and 0 <= seconds < 60, (  # noqa: PT018 - one fact
        f"{what}: expected seconds that a small tensor can take, got {seconds!r}"
    )
    assert type(encoded.cpu_only) is bool, (
        f"{what}: expected a bool as cpu_only, got {encoded.cpu_only!r}"
    )


def _rows_of(stored: Stored) -> dict[str, EncodedTensor]:
    """How one row is decoded, of each tensor that has rows of its own."""
    rows = {name: encoded.row for name, encoded in stored.encoded.items()}
    found = {name: row for name, row in rows.items() if row is not None}
    if not found:
        does_not_apply("its tensors are decoded as a whole")
    return found


def _name_of(dtype: torch.dtype) -> str:
    return next((name for name, one in DTYPES.items() if one == dtype), str(dtype))


def _refused_or_left(request: CodecRequest, codec: WeightCodec, what: str) -> None:
    """Raises AssertionError unless the factory refuses in one line, or claims no tensor that it
    does not have as it must be.
    """
    try:
        found = codec(request)
    except OllmError as error:
        found = {}
        line = str(error)
        assert "\n" not in line, f"{what}: expected one line, got {line}"
    except Exception as error:
        raise AssertionError(f"{what}: expected an OllmError or nothing, got {error!r}") from error
    claimed = sorted(name for name, one in found.items() if not _is_held(one, request))
    assert not claimed, f"{what}: expected it refused or left alone, got {claimed} claimed"


def _is_held(encoded: EncodedTensor, request: CodecRequest) -> bool:
    """Whether core refuses what is stored, by what the codec says that it must be."""
    if encoded.stored is None:
        return False
    infos = [request.tensors[name] for name in encoded.tensors]
    forms = [StoredForm(info.dtype, info.shape) for info in infos]
    return forms != list(encoded.stored(encoded.shape))
