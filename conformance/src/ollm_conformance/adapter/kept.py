"""Checks of KV that is kept on disk: it is found for the prompt, the model and the dtype that it is
of, and not when it is damaged.
"""

from __future__ import annotations

import shutil
from typing import Any

import torch
from torch import Tensor

from ollm_conformance.adapter.base import AdapterSuite
from ollm_conformance.adapter.damage import damages
from ollm_conformance.checks import check
from ollm_conformance.compare import same_bits, same_within
from ollm_conformance.found_again import ask_again, not_misled
from ollm_conformance.subject import Subject
from ollm_core import KeepsPrefixes
from ollm_core.testing import StreamedModel

_CHUNK = 64
"""Every number of tokens that may be found is a multiple of it, but where a check says otherwise:
the chunks and so the bits are then the same, whatever is found.
"""
_BLOCK = 256


class KeptKV(AdapterSuite):
    """What an earlier run has kept on disk."""

    @check(
        "caches.other-prompt",
        "Of a kept prompt that another one begins with, just the tokens that both have are used, "
        "wherever in a block the first other token is.",
        look="caches(): kind and window of each layer; keys and values of a token depend on all "
        "tokens before it",
        needs=["kv-disk", "chunked-prefill"],
    )
    def test_other_prompt(self, subject: Subject) -> None:
        prompt = subject.prompt(_BLOCK + 2 * _CHUNK)
        kinds = subject.adapter.caches(subject.config)
        plain = all(kind.kind == "full" and not kind.states for kind in kinds)
        with subject.open(kv="disk", keep_kv=True, chunk_size=_CHUNK) as model:
            _last_logits(model, prompt)
            for place in (_BLOCK // 2, _BLOCK - 1, _BLOCK, _BLOCK + _CHUNK):
                other = prompt.clone()
                other[place] = 5 + (other[place] - 4) % (subject.vocab_size - 5)
                found, num_cached = _last_logits(model, other)
                what = f"a prompt with another token at {place}"
                assert num_cached <= place, (
                    f"{what}: expected at most {place} tokens to be found, got {num_cached}"
                )
                least = place if plain and place > len(prompt) // 2 else 0
                assert num_cached >= least, (
                    f"{what}: expected {least} tokens to be found, got {num_cached}"
                )
                expected = subject.reference().run(other, _CHUNK, last_only=True)
                if num_cached % _CHUNK:
                    same_within(found, expected, 1e-4, f"logits of {what}")
                else:
                    same_bits(found, expected, f"logits of {what}")

    @check(
        "caches.large-tokens",
        "Of a kept prompt nothing is used for one whose tokens are others by any power of two, "
        "however large vocabularies are.",
        look="core: what the KV of a prompt is found by",
        needs=["kv-disk"],
    )
    def test_large_tokens(self, subject: Subject) -> None:
        prompt = subject.prompt(_BLOCK + 9)
        options: dict[str, Any] = {"kv": "disk", "kv_dir": subject.new_directory()}
        with subject.open(keep_kv=True, **options) as model:
            _last_logits(model, prompt)
            cache = model.new_cache()
            store = cache.store
            assert isinstance(store, KeepsPrefixes), "expected a store that keeps prefixes"
            for bits in range(8, 31):
                other = prompt + (1 << bits)
                for token_ids in (other, torch.where(torch.arange(len(prompt)) < 5, other, prompt)):
                    sequence, num_found = store.find(token_ids)
                    assert num_found == 0, (
                        f"tokens that are larger by 2^{bits}, all or the first: expected none to "
                        f"be found, got {num_found}"
                    )
                    store.release(sequence)
            _, num_found = store.find(prompt)
            assert num_found, "the same tokens: expected them to be found, got none"

    @check(
        "caches.other-dtype",
        "KV on disk of the same weights in another dtype is not used, and stays for the next run "
        "in its own dtype.",
        look="caches(): states and their float32",
        needs=["kv-disk"],
    )
    def test_other_dtype(self, subject: Subject) -> None:
        prompt, kv_dir = subject.prompt(130), subject.new_directory()
        directory = subject.tiny("bfloat16")
        options = {"kv": "disk", "kv_dir": kv_dir, "keep_kv": True}
        for dtype, first, num_expected in (
            ("bfloat16", 96, 0), ("float16", 96, 0), ("float32", 96, 0),
            ("float32", 130, 96), ("bfloat16", 130, 96),
        ):  # fmt: skip
            with subject.open(directory, dtype=dtype, **options) as model:
                found, num_cached = _last_logits(model, prompt[:first])
            what = f"{first} tokens in {dtype} in a directory with other dtypes"
            assert num_cached == num_expected, (
                f"{what}: expected {num_expected} tokens to be found, got {num_cached}"
            )
            reference = subject.reference(dtype, directory)
            cache = reference.new_cache()
            if num_cached:
                reference.run(prompt[:num_cached], cache=cache)
            expected = reference.run(prompt[num_cached:first], cache=cache, last_only=True)
            same_bits(found, expected.float(), f"logits of {what}")

    @check(
        "caches.other-attention",
        "KV on disk of a run with block-wise attention is not used by one with exact attention.",
        look="core: what the KV of a model is found by",
        needs=["kv-disk", "blockwise-attention"],
    )
    def test_other_attention(self, subject: Subject) -> None:
        prompt, kv_dir = subject.prompt(150), subject.new_directory()
        options: dict[str, Any] = {"kv": "disk", "kv_dir": kv_dir, "keep_kv": True}
        with subject.open(attention="blockwise", **options) as model:
            _last_logits(model, prompt)
        with subject.open(attention="exact", **options) as model:
            found, num_cached = _last_logits(model, prompt)
        assert num_cached == 0, f"expected no token of the other run, got {num_cached}"
        same_bits(found, subject.reference().run(prompt, last_only=True), "logits beside its KV")

    @check(
        "caches.damaged",
        "KV, recurrent states and their index on disk that are cut, changed in one bit, exchanged "
        "or of another header are computed again or refused in one line; they never change a "
        "logit.",
        look="caches(): states; code of the adapter that catches errors",
        needs=["kv-disk", "chunked-prefill"],
    )
    def test_damaged(self, subject: Subject) -> None:
        kept, prompt = subject.new_directory(), subject.prompt(_BLOCK + 3 * _CHUNK)
        stored = _BLOCK + _CHUNK
        prompts = [prompt[: stored + _CHUNK], prompt]
        expected = [subject.reference().run(one, _CHUNK, last_only=True) for one in prompts]
        with subject.open(chunk_size=_CHUNK, kv="disk", kv_dir=kept, keep_kv=True) as model:
            _last_logits(model, prompt[:stored])
            found, num_cached = ask_again(model, prompts[0], subject.copy(kept))
            assert num_cached == stored, (
                f"before any damage: expected {stored} tokens to be found, got {num_cached}"
            )
            same_bits(found, expected[0], "logits before any damage")
            for damage in damages(kept):
                directory = subject.copy(kept)
                damage.apply(directory)
                # What was damaged is written anew: a second run finds that.
                for turn in range(2 if damage.again else 1):
                    what = f"{damage.what}, run {turn + 1} after it"
                    logits = not_misled(model, prompts[turn], directory, what)
                    if logits is not None:
                        same_bits(logits, expected[turn], f"{what}: logits")
                shutil.rmtree(directory)


def _last_logits(model: StreamedModel, prompt: Tensor) -> tuple[Tensor, int]:
    """Logits [1, V] after a prompt [T], and how many of its tokens were found on disk."""
    before = model.stats.cached_tokens
    logits = model(input_ids=prompt[None], logits_to_keep=1).logits[0]
    return logits.float(), model.stats.cached_tokens - before
