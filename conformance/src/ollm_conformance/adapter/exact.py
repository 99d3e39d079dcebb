"""Promise 1: the tokens and logits of the un-offloaded model."""

from __future__ import annotations

import pytest

from ollm_conformance.adapter.base import AdapterSuite
from ollm_conformance.checks import check, does_not_apply
from ollm_conformance.compare import same_bits, same_tokens, same_within
from ollm_conformance.rounding import rounded_alike
from ollm_conformance.subject import PROMPT, Subject, greedy, run_pieces
from ollm_core.testing import StreamedModel

_LOOK = "run weights.values first; then layout(), layer_types(), and text_config()"
_DTYPES = pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])


class Exact(AdapterSuite):
    """Bit for bit what transformers computes with the same chunks."""

    @check(
        "exact.resident",
        "With all weights in memory every logit of a long prompt is that of transformers.",
        look=_LOOK,
    )
    @_DTYPES
    def test_resident(self, subject: Subject, dtype: str) -> None:
        prompt = subject.prompt(PROMPT)
        with subject.open(subject.tiny(dtype)) as model:
            found = model(input_ids=prompt[None]).logits[0]
            read = model.stats.weight_bytes_read
            assert read == 0, f"weights in {dtype}: expected all in memory, got {read} bytes read"
        same_bits(found, subject.reference(dtype).run(prompt), f"logits in {dtype}")

    @check(
        "exact.streamed",
        "In the smallest memory that it runs in, with each reading engine, the bits are the same.",
        look="transforms of source() must not keep or change what they are given",
    )
    @pytest.mark.parametrize(("dtype", "reader"), [("float32", "mmap"), ("bfloat16", "direct")])
    def test_streamed(self, subject: Subject, dtype: str, reader: str) -> None:
        prompt, directory = subject.prompt(PROMPT // 2), subject.tiny(dtype)

        def work(model: StreamedModel) -> None:
            model(input_ids=prompt[None], logits_to_keep=1)

        least = subject.least_memory(work, directory=directory, reader=reader)
        with subject.open(directory, device_memory=least, reader=reader) as model:
            used = model.stats.reader
            assert used == reader, f"expected reading engine {reader!r}, got {used!r}"
            expected = subject.reference(dtype).run(prompt, last_only=True)
            for number in range(2):
                found = model(input_ids=prompt[None], logits_to_keep=1).logits[0]
                same_bits(found, expected, f"last logits in {dtype}, pass {number + 1}")
            streamed = model.stats.weight_bytes_read
            assert streamed > 0, f"weights in {dtype}: expected some to be streamed, got none read"

    @check(
        "exact.decode",
        "Greedy tokens after a long prompt, and every logit behind them, are transformers'.",
        look=_LOOK,
    )
    @_DTYPES
    def test_decode(self, subject: Subject, dtype: str) -> None:
        prompt = subject.prompt(PROMPT // 2)
        tokens, logits = subject.reference(dtype).greedy(prompt, 24)
        with subject.open(subject.tiny(dtype)) as model:
            found_tokens, found_logits = greedy(model, prompt, 24)
        same_tokens(found_tokens, tokens, f"greedy tokens in {dtype}")
        same_bits(found_logits, logits.float(), f"logits of the steps in {dtype}")

    @check(
        "exact.chunks",
        "Any chunk size gives transformers' bits for that size, and the same tokens as any other.",
        look="layout(): rotary embeddings and masks that depend on more than the position",
        needs=["chunked-prefill"],
    )
    @pytest.mark.parametrize("chunk_size", [1, 37, 256, 257, PROMPT])
    def test_chunks(self, subject: Subject, chunk_size: int) -> None:
        prompt = subject.prompt(PROMPT if chunk_size > 1 else 40)
        reference = subject.reference()
        with subject.open(chunk_size=chunk_size) as model:
            found = model(input_ids=prompt[None]).logits[0]
        same_bits(found, reference.run(prompt, chunk_size), f"logits in chunks of {chunk_size}")
        whole = reference.run(prompt, PROMPT)
        tolerance = 1e-4 * _rounding(subject)
        same_within(found, whole, tolerance, f"chunks of {chunk_size} against one chunk")
        same_tokens(
            found.argmax(-1).tolist(),
            whole.argmax(-1).tolist(),
            f"most likely tokens in chunks of {chunk_size}",
        )

    @check(
        "exact.blockwise",
        "Block-wise attention is as near to the model in float64 as transformers is: "
        "twice its error at most in the mean, however much the model makes of rounding.",
        look="attention options that the family's modules pass: windows, sinks, scaling, soft caps",
        needs=["blockwise-attention", "chunked-prefill"],
    )
    @pytest.mark.parametrize(
        ("chunk_size", "dtype"), [(61, "float32"), (400, "float32"), (400, "bfloat16")]
    )
    def test_blockwise(self, subject: Subject, chunk_size: int, dtype: str) -> None:
        if dtype != "float32" and subject.adapter.layout(subject.config).experts:
            does_not_apply("in bfloat16 a router's choice turns on the last bits")
        reference, prompt = subject.reference(dtype), subject.prompt(PROMPT)
        pieces = prompt.split([PROMPT - 10, 1, 1, 8])
        with subject.open(
            subject.tiny(dtype), chunk_size=chunk_size, attention="blockwise"
        ) as model:
            found = run_pieces(model, pieces)
        expected = reference.run_pieces(pieces, chunk_size)
        true = reference.in_float64.run(prompt, 400)
        rounded_alike(
            found, expected, true, f"block-wise logits in {dtype}, chunks of {chunk_size}"
        )


def _rounding(subject: Subject) -> int:
    """How many times larger differences may be: a recurrence adds up the rounding of all tokens,
    in transformers too.
    """
    return 10 if any(kind.states for kind in subject.adapter.caches(subject.config)) else 1
