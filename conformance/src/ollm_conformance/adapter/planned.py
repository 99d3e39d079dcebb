"""Promise 3, of memory: what `ollm plan` tells is what a run really takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import ollm
from ollm_conformance.adapter.base import AdapterSuite
from ollm_conformance.allocated import live_bytes, only_new_objects
from ollm_conformance.checks import check
from ollm_conformance.models import model_config
from ollm_conformance.subject import CHUNK, Subject
from ollm_core.testing import PlannedRun, TierTracker, plan_run, supports

_PROMPT = 160
_BEYOND = 1500
"""Tokens behind a window: several blocks of KV, which a layer with a window lets go of."""
_ROUNDED = 32 << 10
"""Bytes that buffers are rounded up by, which is more than a tenth of a tiny model."""


class Planned(AdapterSuite):
    """A plan against the run that follows it."""

    @check(
        "memory.plan",
        "In the least memory and in more, with KV anywhere, in the stored dtype and another, the "
        "peaks that a plan tells of device and host are never below what the run really allocates, "
        "and within 10% of it and 32 KiB.",
        look="source() and its scratch_bytes, caches(): sizes that differ from what is made",
    )
    @pytest.mark.parametrize(
        ("kv", "roomy", "dtype"),
        [
            ("device", False, "bfloat16"),
            ("device", True, "bfloat16"),
            ("host", False, "float32"),  # weights converted as they are streamed
            ("disk", True, "bfloat16"),
        ],
    )
    def test_plan(self, subject: Subject, kv: str, roomy: bool, dtype: str) -> None:
        chunk_size = CHUNK if supports(subject.adapter, "chunked-prefill") else None
        directory = subject.tiny("bfloat16")
        plan = plan_run(
            subject.dry_run(directory, dtype),
            num_tokens=_PROMPT + 2,
            num_new=2,
            kv=kv,
            chunk_size=chunk_size,
            roomy=roomy,
        )
        with only_new_objects():
            found = _measured(subject, directory, kv, plan, dtype)
        for memory, measured, told in zip(
            ("device", "host"), found, (plan.device_peak, plan.host_peak), strict=True
        ):
            most = 1.1 * measured + _ROUNDED
            assert measured <= told <= most, (
                f"{memory} memory with KV on {kv} in {plan.device_memory} bytes of the device and "
                f"{plan.host_memory} of the host: expected a plan from {measured} to {most:.0f} "
                f"bytes, got {told}"
            )
        if kv == "device" and roomy:
            _tells_kv(subject, directory)


def _tells_kv(subject: Subject, directory: Path) -> None:
    """Raises AssertionError unless a plan tells the KV of a text beyond every window, which is most
    of what a long run holds and reads. A store has some blocks more.
    """
    kinds = subject.adapter.caches(subject.config)
    if all(kind.window is None for kind in kinds):
        return  # what grows by the token is in the peaks
    positions = int(model_config(subject.config).get_text_config().max_position_embeddings)
    num_tokens = min(positions, max(kind.window or 0 for kind in kinds) + _BEYOND)
    told = ollm.plan(
        directory,
        context=num_tokens,
        max_new_tokens=1,
        device="cpu",
        device_memory="1GB",
        host_memory="1GB",
        registry=subject.registry,
    ).kv_bytes
    with subject.open(directory, kv="device") as model:
        cache, spare = model.new_cache(), 0
        store = cache.store
        sequence = store.new_sequence()
        for layer_idx, kind in enumerate(kinds):
            for begin in range(0, num_tokens, CHUNK):
                length = min(CHUNK, num_tokens - begin)
                keys = torch.zeros(kind.num_kv_heads, length, kind.head_dim, dtype=torch.bfloat16)
                store.append(layer_idx, sequence, keys, keys)
            spare += 4 * kind.num_kv_heads * kind.head_dim * 3 * store.block_size
        store.commit(sequence)
        held = store.tier_bytes().device
    assert held - spare <= told <= held, (
        f"KV of {num_tokens} tokens: expected a plan from {max(held - spare, 0)} to {held} bytes, "
        f"got {told}"
    )


def _measured(
    subject: Subject, directory: Path, kv: str, plan: PlannedRun, dtype: str
) -> tuple[int, int]:
    """Bytes that a prompt and a step really have at their peak, of the device's memory and of the
    host's: of two prompts, those of the one that takes more.
    """
    prompts, kv_on_device = subject.prompts(_PROMPT), kv == "device"
    found = []
    before = live_bytes()
    with subject.open(
        directory,
        kv=kv,
        dtype=dtype,
        device_memory=plan.device_memory,
        host_memory=plan.host_memory,
    ) as model:
        for prompt in prompts:
            peaks = []
            with TierTracker(kv_on_device=kv_on_device) as whole:
                cache = model.new_cache(num_tokens=_PROMPT + 2)
                for ids in (prompt[None], prompt[None, :1]):
                    with TierTracker(kv_on_device=kv_on_device) as one_pass:
                        model(input_ids=ids, past_key_values=cache, logits_to_keep=1)
                    # What is alive now and was not made by an operation was there at the peak too.
                    peaks.append(live_bytes() - before - one_pass.used + one_pass.peak)
            full, made = live_bytes(), whole.host_used
            cache.store.close()
            stored = full - live_bytes()
            del cache
            if kv_on_device:
                found.append((max(peaks), whole.host_peak))
            else:
                found.append((max(peaks) - stored, whole.host_peak + stored - made))
    device, host = zip(*found, strict=True)
    return max(device), max(host)
