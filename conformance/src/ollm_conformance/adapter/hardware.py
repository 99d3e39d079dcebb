"""Checks that need a GPU (level gpu) or time and a real model (level speed)."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch

from ollm_conformance.adapter.base import AdapterSuite
from ollm_conformance.card import CardPeak
from ollm_conformance.checks import check, does_not_apply
from ollm_conformance.compare import same_bits, same_tokens
from ollm_conformance.models import DTYPES
from ollm_conformance.subject import PROMPT, Reference, Subject, greedy
from ollm_core.testing import StreamedModel

_GPU_DTYPES = pytest.mark.parametrize("dtype", ["float16", "bfloat16"])


class Gpu(AdapterSuite):
    """The promises on a CUDA device."""

    @check(
        "gpu.exact",
        "On a GPU, in the least memory, logits and tokens are those of transformers there.",
        look="transforms of source(), which run on the device",
        level="gpu",
    )
    @pytest.mark.parametrize("kv", ["device", "host", "disk"])
    @_GPU_DTYPES
    def test_exact(self, subject: Subject, dtype: str, kv: str) -> None:
        _needs_cuda()
        prompt, directory = subject.prompt(PROMPT), subject.tiny(dtype)
        reference = Reference(directory, DTYPES[dtype], "cuda")
        tokens, logits = reference.greedy(prompt, 20)

        def work(model: StreamedModel) -> None:
            greedy(model, prompt, 3)

        least = subject.least_memory(work, directory, kv=kv, device="cuda")
        with subject.open(directory, device_memory=least, kv=kv, device="cuda") as model:
            found_tokens, found_logits = greedy(model, prompt, 20)
        same_tokens(found_tokens, tokens, f"tokens in {dtype} with KV on {kv}")
        same_bits(found_logits.cpu(), logits.float().cpu(), f"logits in {dtype} with KV on {kv}")

    @check(
        "gpu.memory",
        "The planned device peak is never below what is asked of CUDA, and within 10% of it.",
        look="transforms of source() that allocate more than their scratch_bytes",
        level="gpu",
    )
    @pytest.mark.parametrize("attention", ["exact", "blockwise"])
    def test_memory(self, subject: Subject, attention: str) -> None:
        _needs_cuda()
        prompt = subject.prompt(2 * PROMPT)
        with (
            CardPeak() as peak,
            subject.open(subject.tiny("bfloat16"), device="cuda", attention=attention) as model,
        ):
            model(input_ids=prompt[None], logits_to_keep=1)
            planned = model.stats.device_peak_bytes
        measured = peak.requested_bytes
        assert measured <= planned <= 1.1 * measured, (
            f"attention {attention}: expected a plan from {measured} to {1.1 * measured:.0f} "
            f"bytes, got {planned}"
        )


class Speed(AdapterSuite):
    """What the library costs on top of transformers, with a real model."""

    @check(
        "speed.resident-decode",
        "With everything in memory, decoding keeps 80% of the speed of un-offloaded transformers.",
        look="transforms of source(), which run at each pass; `ollm run` tells where time goes",
        level="speed",
    )
    def test_resident_decode(self, subject: Subject) -> None:
        if subject.real_checkpoint is None:
            does_not_apply("no real checkpoint was named")
        prompt = subject.prompt(64)
        reference = subject.reference("bfloat16", subject.real_checkpoint)
        with subject.open(subject.real_checkpoint, dtype="bfloat16", device_memory="8GB") as model:
            ours = min(_seconds(lambda: greedy(model, prompt, 32)) for _ in range(3))
        theirs = min(_seconds(lambda: reference.greedy(prompt, 32)) for _ in range(3))
        assert ours <= theirs / 0.8, (
            f"expected at most {theirs / 0.8:.2f} s for 32 tokens, got {ours:.2f} s"
        )


def _needs_cuda() -> None:
    if not torch.cuda.is_available():
        pytest.fail("expected a CUDA device, got none: run this level where there is one")


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
