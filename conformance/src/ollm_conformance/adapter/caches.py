"""Checks of what the model remembers: in every tier, cut, shared, and after a second turn."""

from __future__ import annotations

import functools
import json

import pytest
import torch
from torch import Tensor

from ollm_conformance.adapter.base import AdapterSuite
from ollm_conformance.checks import check
from ollm_conformance.compare import same_bits, same_tokens, same_within
from ollm_conformance.kinds import same_kinds
from ollm_conformance.subject import PROMPT, Reference, Subject, generate, greedy
from ollm_core.testing import parse_object

_LOOK = "caches(): kind, num_kv_heads, head_dim and window of each layer"
_TIERS = pytest.mark.parametrize(
    "kv",
    [
        pytest.param("device", id="device"),
        pytest.param("host", id="host"),
        pytest.param("disk", id="disk"),
    ],
)


class Caches(AdapterSuite):
    """Keys and values, on the device, in host memory and on disk."""

    @check(
        "caches.kinds",
        "Each layer's declared cache has the shape and the window of the one in transformers.",
        look=_LOOK,
    )
    def test_kinds(self, subject: Subject) -> None:
        reference = subject.reference("bfloat16")
        cache = reference.new_cache()
        reference.run(subject.prompt(PROMPT), cache=cache)
        declared = subject.adapter.caches(subject.config)
        same_kinds(declared, cache, "tiny_config()")

    @check(
        "caches.tiers",
        "KV on the device, in host memory and on disk give the same bits.",
        look=_LOOK,
        needs=["kv-device", "kv-host", "kv-disk"],
    )
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @_TIERS
    def test_tiers(self, subject: Subject, dtype: str, kv: str) -> None:
        prompt = subject.prompt(PROMPT // 2)
        tokens, logits = subject.reference(dtype).greedy(prompt, 6)
        with subject.open(subject.tiny(dtype), kv=kv) as model:
            found_tokens, found_logits = greedy(model, prompt, 6)
            assert model.stats.kv_tier == kv, f"expected KV on {kv}, got {model.stats.kv_tier}"
        same_tokens(found_tokens, tokens, f"tokens with KV on {kv}")
        same_bits(found_logits, logits.float(), f"logits with KV on {kv}")

    @check(
        "caches.decode-equals-prefill",
        "Tokens one by one give the logits of the same tokens as one prompt.",
        look=_LOOK,
    )
    def test_decode_equals_prefill(self, subject: Subject) -> None:
        prompt = subject.prompt(PROMPT)
        with subject.open() as model:
            whole = model(input_ids=prompt[None]).logits[0]
            cache = model.new_cache()
            model(input_ids=prompt[None, :500], past_key_values=cache, logits_to_keep=1)
            steps = [
                model(input_ids=prompt[None, i : i + 1], past_key_values=cache).logits[0]
                for i in range(500, 520)
            ]
        same_within(torch.cat(steps), whole[500:520], 1e-4, "logits of the steps")

    @check(
        "caches.truncate",
        "After tokens are dropped, others give the bits of a run that never had them.",
        look=_LOOK,
        needs=["truncate"],
    )
    @_TIERS
    def test_truncate(self, subject: Subject, kv: str) -> None:
        prompt, other = subject.prompt(PROMPT), subject.prompt(PROMPT, seed=1)
        with subject.open(kv=kv) as model:
            for num_dropped in (1, 5, 40):
                kept = 290 - num_dropped
                cache = model.new_cache()
                model(input_ids=prompt[None, :kept], past_key_values=cache, logits_to_keep=1)
                model(input_ids=prompt[None, kept:290], past_key_values=cache, logits_to_keep=1)
                cache.crop(-num_dropped)
                found = model(input_ids=other[None, :9], past_key_values=cache).logits[0]
                expected = subject.once(
                    ("caches.truncate", kept),
                    functools.partial(_followed, subject.reference(), prompt[:kept], other[:9]),
                )
                what = f"logits after {num_dropped} tokens were dropped, KV on {kv}"
                same_bits(found, expected, what)

    @check(
        "caches.fork",
        "Two continuations of each of two prompts do not see each other.",
        look=_LOOK,
        needs=["batch"],
    )
    @_TIERS
    def test_fork(self, subject: Subject, kv: str) -> None:
        prompts = [subject.prompt(300), subject.prompt(300, seed=3)]
        tails = [subject.prompt(20, seed=s) for s in (1, 2)]
        rows = [(prompt, tail) for prompt in prompts for tail in tails]
        expected = [subject.reference().run(torch.cat(row))[-1] for row in rows]
        with subject.open(kv=kv) as model:
            cache = model.new_cache()
            ids = torch.stack(prompts)
            model(input_ids=ids, past_key_values=cache, logits_to_keep=1)
            cache.batch_repeat_interleave(2)
            new = torch.stack([tail for _, tail in rows])
            model(input_ids=new[:, :10], past_key_values=cache, logits_to_keep=1)
            swapped = [1, 0, 3, 2]
            cache.reorder_cache(torch.tensor(swapped))
            found = model(
                input_ids=new[swapped, 10:], past_key_values=cache, logits_to_keep=1
            ).logits
        for row, other in enumerate(swapped):
            what = f"logits of row {row} of 2 prompts that go on in 2 ways, KV on {kv}"
            same_within(found[row, -1], expected[other], 1e-4, what)

    @check(
        "caches.second-turn",
        "A second prompt on the same cache goes on where the first answer ended, bit for bit.",
        look=_LOOK,
    )
    @_TIERS
    def test_second_turn(self, subject: Subject, kv: str) -> None:
        first, second = subject.prompt(200), subject.prompt(150, seed=1)
        reference = subject.reference()
        cache = reference.new_cache()
        logits = reference.run(first, cache=cache)[-1:]
        said = [int(logits.argmax())]
        for _ in range(7):
            said.append(int(reference.run(torch.tensor(said[-1:]), cache=cache).argmax()))
        turn = torch.cat([torch.tensor(said[-1:]), second])
        expected = reference.run(turn, cache=cache)
        with subject.open(kv=kv) as model:
            mine = model.new_cache()
            found = generate(model, first[None], 8, past_key_values=mine)
            same_tokens(
                found[0, len(first) :].tolist(), said, f"tokens of the first turn with KV on {kv}"
            )
            logits = model(input_ids=turn[None], past_key_values=mine).logits[0]
        same_bits(logits, expected, f"logits of the second turn with KV on {kv}")

    @check(
        "caches.reopen",
        "KV on disk is found by the next run, which goes on from it bit for bit; damage is not "
        "believed.",
        look=_LOOK,
        needs=["kv-disk"],
    )
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_reopen(self, subject: Subject, dtype: str) -> None:
        prompt, kv_dir = subject.prompt(PROMPT), subject.new_directory()
        reference = subject.reference(dtype)
        cache = reference.new_cache()
        reference.run(prompt[:500], cache=cache)
        expected = reference.run(prompt[500:], cache=cache, last_only=True)
        options = {"kv": "disk", "kv_dir": kv_dir, "keep_kv": True}
        with subject.open(subject.tiny(dtype), **options) as model:
            model(input_ids=prompt[None, :500], logits_to_keep=1)
        with subject.open(subject.tiny(dtype), **options) as model:
            found = model(input_ids=prompt[None], logits_to_keep=1).logits[0]
            counts = model.stats.cached_tokens, model.stats.prefill_tokens
        assert counts == (500, 100), (
            f"{dtype}: expected 500 tokens found and 100 computed, got {counts[0]} and {counts[1]}"
        )
        same_bits(found, expected, f"logits after 500 found tokens in {dtype}")
        for path in kv_dir.rglob("layer-*"):
            with path.open("r+b") as file:
                file.seek(path.stat().st_size // 2)
                file.write(bytes(4096))
        with subject.open(subject.tiny(dtype), **options) as model:
            found = model(input_ids=prompt[None, :500], logits_to_keep=1).logits[0]
        whole = reference.run(prompt[:500], last_only=True)
        same_within(
            found, whole, 1e-4 if dtype == "float32" else 0.1, f"logits after damage in {dtype}"
        )

    @check(
        "caches.other-weights",
        "KV on disk of other weights is not found, where headers, sizes, times and the ends of "
        "every tensor are the same, nor that of the same weights under another config.json.",
        look=_LOOK,
        needs=["kv-disk"],
    )
    def test_other_weights(self, subject: Subject) -> None:
        prompt, kv_dir = subject.prompt(300), subject.new_directory()
        other = subject.copy(subject.tiny())
        subject.overwrite(other)
        options = {"kv": "disk", "kv_dir": kv_dir, "keep_kv": True}
        with subject.open(subject.tiny(), **options) as model:
            model(input_ids=prompt[None], logits_to_keep=1)
        with subject.open(other, **options) as model:
            found = model(input_ids=prompt[None], logits_to_keep=1).logits[0]
            cached = model.stats.cached_tokens
        assert cached == 0, f"cached_tokens: expected none of the other weights, got {cached}"
        expected = subject.reference(directory=other).run(prompt, last_only=True)
        same_bits(found, expected, "logits beside KV of other weights")
        changed = subject.copy(subject.tiny())
        config = parse_object((changed / "config.json").read_bytes())
        text = config.get("text_config", config)
        for key in [key for key in text if key.endswith(("norm_eps", "norm_epsilon"))][:1]:
            text[key] *= 100
            (changed / "config.json").write_text(json.dumps(config))
            with subject.open(changed, **options) as model:
                model(input_ids=prompt[None], logits_to_keep=1)
                cached = model.stats.cached_tokens
            assert cached == 0, f"cached_tokens with another {key}: expected none, got {cached}"

    @check(
        "caches.bytes",
        "Stored keys and values take the bytes of the KV heads, rounded up to blocks.",
        look=_LOOK,
    )
    @_TIERS
    def test_bytes(self, subject: Subject, kv: str) -> None:
        kinds = subject.adapter.caches(subject.config)
        with subject.open(subject.tiny("bfloat16"), kv=kv) as model:
            cache = model.new_cache()
            model(input_ids=subject.prompt(PROMPT)[None], past_key_values=cache, logits_to_keep=1)
            held = cache.store.tier_bytes()
            block = cache.store.block_size
        found = held.device + held.host + held.disk
        most = 0
        for kind in kinds:
            tokens = PROMPT if kind.window is None else min(PROMPT, kind.window + 2 * block)
            blocks = -(-tokens // block) + 2  # unfinished ones, and those being written
            most += blocks * -(-2 * 2 * kind.num_kv_heads * kind.head_dim * block // 4096) * 4096
        staging = 64 << 20 if kv == "disk" else 0
        most += staging
        assert 0 < found <= most, f"KV on {kv}: expected 1 to {most} bytes, got {found}"


def _followed(reference: Reference, prompt: Tensor, other: Tensor) -> Tensor:
    """Transformers' logits of `other` [T] after a prompt [T]."""
    cache = reference.new_cache()
    reference.run(prompt, cache=cache, last_only=True)
    return reference.run(other, cache=cache)
