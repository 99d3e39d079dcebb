"""Promise 2: budgets hold, the plan is near the truth, and everything is given back."""

from __future__ import annotations

import gc
import os
import threading
from pathlib import Path

import pytest
import torch

from ollm_conformance.adapter.base import AdapterSuite
from ollm_conformance.allocated import live_bytes, only_new_objects
from ollm_conformance.checks import check, does_not_apply
from ollm_conformance.compare import refused
from ollm_conformance.subject import Subject, generate
from ollm_core import DoesNotFitError
from ollm_core.testing import StreamedModel, TierTracker

_LOOK = "transforms of source() that allocate more than their scratch_bytes; caches(): sizes"


class Memory(AdapterSuite):
    """Device and host memory."""

    @check(
        "memory.budget",
        "What a refusal names is enough, one byte less is refused, and the peak stays inside.",
        look=_LOOK,
        needs=["kv-device"],
    )
    @pytest.mark.parametrize("attention", ["exact", "blockwise"])
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_budget(self, subject: Subject, dtype: str, attention: str) -> None:
        prompt, directory = subject.prompt(300), subject.tiny(dtype)

        def work(model: StreamedModel) -> None:
            for ids in (prompt, prompt[:1]):
                model(input_ids=ids[None], logits_to_keep=1)

        least = subject.least_memory(work, directory, attention=attention, kv="device")
        with subject.open(
            directory, device_memory=least, attention=attention, kv="device"
        ) as model:
            work(model)
            peak = model.stats.device_peak_bytes
        what = f"{dtype}, attention {attention}"
        assert peak <= least, f"{what}: expected a peak of at most {least} bytes, got {peak}"
        with (
            refused(DoesNotFitError, f"{what}, in {least - 1} bytes of {least}"),
            subject.open(
                directory, device_memory=least - 1, attention=attention, kv="device"
            ) as model,
        ):
            work(model)

    @check(
        "memory.layers",
        "No more layers are kept on the device than was asked for, none for 0, with room for all.",
        look="core keeps layers: an adapter has no part in it",
    )
    def test_layers(self, subject: Subject) -> None:
        ids = subject.prompt(20)[None]
        for most in (0, 1):
            with subject.open(device_layers=most) as model:
                for number in range(2):
                    model(input_ids=ids)
                    kept = model.stats.device_layers
                    assert kept == most, (
                        f"device_layers={most}, pass {number + 1}: expected {most} layers kept, "
                        f"got {kept}"
                    )

    @check(
        "memory.planned",
        "The planned device peak is never below what is really allocated, and within 10% of it.",
        look=_LOOK,
        needs=["kv-device"],
    )
    @pytest.mark.parametrize(("resident", "attention"), [(True, "exact"), (False, "blockwise")])
    def test_planned(self, subject: Subject, resident: bool, attention: str) -> None:
        prompts, directory = subject.prompts(400), subject.tiny("bfloat16")

        def work(model: StreamedModel) -> None:
            for prompt in prompts:
                model(input_ids=prompt[None], logits_to_keep=1)

        options = {"attention": attention, "kv": "device"}
        budget = 1 << 30
        if not resident:
            budget = subject.least_memory(work, directory, **options)
        with only_new_objects():
            before = live_bytes()
            with subject.open(directory, device_memory=budget, **options) as model:
                work(model)
                model(input_ids=prompts[0][None, :1], logits_to_keep=1)  # layers that fit beside it
                gc.collect()  # stay, and go again for what needs their room
                with TierTracker(kv_on_device=True) as tracker:
                    work(model)
                # What is alive now and was not made by an operation was there at the peak too.
                measured = live_bytes() - before - tracker.used + tracker.peak
                planned = model.stats.device_peak_bytes
        assert measured <= planned <= 1.1 * measured, (
            f"attention {attention}, budget {budget}: expected a plan from {measured} to "
            f"{1.1 * measured:.0f} bytes, got {planned}"
        )

    @check(
        "memory.flat",
        "Twice the prompt adds nothing to the device peak but where its tokens stand: hidden "
        "states, and what waits for routed experts, go to the host.",
        look=_LOOK,
        needs=["blockwise-attention", "chunked-prefill", "kv-disk"],
    )
    def test_flat(self, subject: Subject) -> None:
        directory = subject.tiny("bfloat16")
        least = {}
        for num_tokens in (512, 1024):
            prompt = subject.prompt(num_tokens)

            def work(model: StreamedModel, prompt: torch.Tensor = prompt) -> None:
                model(input_ids=prompt[None], logits_to_keep=1)

            least[num_tokens] = subject.least_memory(
                work, directory, attention="blockwise", kv="disk", chunk_size=64
            )
        grown = least[1024] - least[512]
        most = 512 * 64
        assert grown <= most, (
            f"1024 tokens in place of 512: expected at most {most} bytes more, got {grown}"
        )

    @check(
        "memory.host",
        "KV in host memory counts against the host's budget, which holds.",
        look="caches(): sizes",
        needs=["kv-host"],
    )
    def test_host(self, subject: Subject) -> None:
        prompt, directory = subject.prompt(500), subject.tiny("bfloat16")
        with subject.open(directory, kv="host") as model:
            cache = model.new_cache()
            model(input_ids=prompt[None], past_key_values=cache, logits_to_keep=1)
            held, peak = cache.store.tier_bytes().host, model.stats.host_peak_bytes
        assert held > 0, "KV on host: expected some bytes in host memory, got none"
        assert held <= peak, f"KV on host: expected a peak from {held} bytes on, got {peak}"
        with subject.open(directory, kv="host", host_memory=peak) as model:
            model(input_ids=prompt[None], logits_to_keep=1)
        with (
            refused(DoesNotFitError, f"KV on host in {peak - 1} bytes of {peak}"),
            subject.open(directory, kv="host", host_memory=peak - 1) as model,
        ):
            model(input_ids=prompt[None], logits_to_keep=1)

    @check(
        "memory.generate",
        "An answer that does not fit is refused before its first pass, not in the middle.",
        look="caches(): what a layer remembers of each token",
        needs=["kv-device", "chunked-prefill"],
    )
    def test_generate(self, subject: Subject) -> None:
        if all(kind.kind != "full" for kind in subject.adapter.caches(subject.config)):
            does_not_apply("no layer remembers every token")
        prompt, directory = subject.prompt(250), subject.tiny("bfloat16")

        def work(model: StreamedModel) -> None:
            generate(model, prompt[None], 12)  # into the second block of 256 tokens

        options = {"kv": "device", "chunk_size": 8}  # a pass takes less than a block of KV
        least = subject.least_memory(work, directory, **options)
        with subject.open(directory, device_memory=least - 1, **options) as model:
            with refused(DoesNotFitError, f"12 tokens after 250 in {least - 1} bytes"):
                work(model)
            passes = model.stats.weight_passes
        assert passes == 0, f"expected a refusal before any pass, got {passes} passes"

    @check(
        "memory.freed",
        "After close no tensor, file, thread or KV directory is left.",
        look="transforms of source() that keep what they are given",
    )
    @pytest.mark.parametrize("kv", ["device", "host", "disk"])
    def test_freed(self, subject: Subject, kv: str) -> None:
        directory, kv_dir = subject.tiny("bfloat16"), subject.new_directory()
        prompt = subject.prompt(300)
        subject.open(directory, kv="device").close()  # what the suite remembers of it is there
        with only_new_objects():
            before = live_bytes(), _open_files(), _threads()
            model = subject.open(directory, kv=kv, kv_dir=kv_dir)
            for _ in range(2):
                generate(model, prompt[None], 3)
            cache = model.new_cache()  # which somebody still has when the model is closed
            model(input_ids=prompt[None], past_key_values=cache, logits_to_keep=1)
            model.close()
            model.close()
            for account in (model.accounts.device, model.accounts.host):
                assert not account.used, (
                    f"{account.name}, KV on {kv}: expected nothing held, got {account.kinds}"
                )
            del cache
            gc.collect()
            after = live_bytes(), _open_files(), _threads()
        for what, one, other in zip(("bytes", "open files", "threads"), before, after, strict=True):
            assert other <= one, f"KV on {kv}: expected {one} {what} as before, got {other}"
        left = [path.name for path in kv_dir.iterdir()] if kv_dir.is_dir() else []
        assert not left, f"KV on {kv}: expected an empty KV directory, got {left}"


def _open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir())) if os.path.isdir("/proc/self/fd") else 0


def _threads() -> int:
    return sum(thread.name.startswith("ollm") for thread in threading.enumerate())
