"""Checks at sizes where counting goes wrong: many positions, the edges of a window, passes of few
tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ollm_conformance.adapter.base import AdapterSuite
from ollm_conformance.checks import check, does_not_apply
from ollm_conformance.compare import refused, same_bits, same_tokens, same_within
from ollm_conformance.models import model_config
from ollm_conformance.rounding import rounded_alike
from ollm_conformance.subject import Reference, Subject, greedy, left_padded, run_pieces
from ollm_core import InputError, KVStoreError
from ollm_core.testing import read_config, supports

_LONG = 5000
_LONG_CHUNK = 256
_FEW_POSITIONS = 150
_FAR = 600  # tokens before a window that no store of ours keeps
_LOOK = "caches(): the window of each layer; layout(): masks that depend on more than the position"


class Sizes(AdapterSuite):
    """Bit for bit what transformers computes, where prompts and passes are long or short."""

    @check(
        "exact.long",
        "After 5,000 tokens, or as many as the model has positions, a step and a short pass have "
        "transformers' bits, and block-wise its values within 0.001 of the scale.",
        look="layout(): rotary embeddings that are cut at a length, or made of rounded positions",
        needs=["chunked-prefill"],
    )
    def test_long(self, subject: Subject) -> None:
        directory = _long_model(subject)
        config = subject.adapter.text_config(read_config(directory))
        num_tokens = min(_LONG, int(model_config(config).get_text_config().max_position_embeddings))
        first, *rest = subject.prompt(num_tokens).split([num_tokens - 4, 1, 3])
        reference = Reference(directory, torch.float32)
        past = reference.new_cache()
        reference.run(first, _LONG_CHUNK, past, last_only=True)
        expected = reference.run_pieces(rest, cache=past)
        able = supports(subject.adapter, "blockwise-attention")
        for attention in ("exact", "blockwise") if able else ("exact",):
            with subject.open(directory, chunk_size=_LONG_CHUNK, attention=attention) as model:
                cache = model.new_cache(num_tokens=num_tokens)
                model(input_ids=first[None], past_key_values=cache, logits_to_keep=1)
                found = run_pieces(model, rest, cache)
            what = f"{attention} attention, logits after {len(first)} tokens"
            if attention == "exact":
                same_bits(found, expected, what)
            else:
                same_within(found, expected, 1e-3, what)

    @check(
        "exact.window-edges",
        "Prompts of a window, one token less and one more, in chunks of a window and of one token "
        "more, then steps and a pass of two tokens, are transformers'.",
        look=_LOOK,
        needs=["chunked-prefill"],
    )
    @pytest.mark.parametrize(
        ("kv", "attention"), [("device", "exact"), ("disk", "exact"), ("device", "blockwise")]
    )
    def test_window_edges(self, subject: Subject, kv: str, attention: str) -> None:
        reference = subject.reference()
        for window in _windows(subject):
            prompt = subject.prompt(2 * window + 8)
            for chunk_size, lengths in (
                (window, (window - 1, window, window + 1)),
                (window + 1, (window + 1, 2 * window + 3)),
            ):
                with subject.open(chunk_size=chunk_size, kv=kv, attention=attention) as model:
                    for length in lengths:
                        pieces = prompt[: length + 5].split([length, 1, 2, 1, 1])
                        found = run_pieces(model, pieces)
                        expected = reference.run_pieces(pieces, chunk_size)
                        what = (
                            f"window of {window}, chunks of {chunk_size}, KV on {kv}: logits of "
                            f"{length} tokens and what follows"
                        )
                        if attention == "exact":
                            same_bits(found, expected, what)
                        else:
                            true = reference.in_float64.run(prompt)[: length + 5]
                            rounded_alike(found, expected, true, what)

    @check(
        "exact.window-undo",
        "A pass that is longer than a window is undone, and other tokens then give the bits of a "
        "run that never had it; or that is refused with KVStoreError, and the cache is as it was.",
        look=_LOOK,
        needs=["truncate", "chunked-prefill"],
    )
    @pytest.mark.parametrize("kv", ["device", "disk"])
    def test_window_undo(self, subject: Subject, kv: str) -> None:
        reference, other = subject.reference(), subject.prompt(9, seed=1)
        for window in _windows(subject):
            for num_kept, num_undone in ((20, 7), (20, _FAR), (-window // 2, 7)):
                num_kept, num_undone = window + num_kept, window + num_undone
                pieces = subject.prompt(num_kept + num_undone).split([num_kept, num_undone])
                what = f"window of {window}: {num_undone} of {num_kept + num_undone} tokens undone"
                with subject.open(kv=kv) as model:
                    cache = model.new_cache()
                    run_pieces(model, pieces, cache)
                    kept = num_kept
                    try:
                        cache.crop(-num_undone)
                    except KVStoreError:
                        kept += num_undone
                    length = cache.get_seq_length()
                    assert length == kept, f"{what}: expected {kept} to be left, got {length}"
                    found = run_pieces(model, [other], cache)
                expected = reference.run_pieces([*pieces[: 1 if kept == num_kept else 2], other])
                same_bits(found, expected[kept:], f"{what}: logits of other tokens")

    @check(
        "exact.short-passes",
        "Passes of 1, 2, 63, 64 and 65 tokens one after another give transformers' bits.",
        look="caches(): states; layout(): a mixer that starts anew or fills up its last tokens",
    )
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_short_passes(self, subject: Subject, dtype: str) -> None:
        pieces = subject.prompt(199).split([1, 2, 63, 64, 65, 1, 2, 1])
        with subject.open(subject.tiny(dtype)) as model:
            found = run_pieces(model, pieces)
        expected = subject.reference(dtype).run_pieces(pieces)
        same_bits(found, expected, f"logits in {dtype} of passes of few tokens")

    @check(
        "exact.last-position",
        "A prompt, a text that grows on a cache and one that is generated may fill every position "
        "of the model, with transformers' bits; one token more is refused, in whichever row of a "
        "batch, and the cache stays.",
        look="layout(), text_config(): max_position_embeddings",
    )
    def test_last_position(self, subject: Subject) -> None:
        if "max_position_embeddings" not in subject.config:
            does_not_apply("its tiny config states no number of positions")
        directory = subject.tiny(changes={"max_position_embeddings": _FEW_POSITIONS})
        reference, prompt = subject.reference(directory=directory), subject.prompt(_FEW_POSITIONS)
        told = f"a model of {_FEW_POSITIONS} positions"
        pieces = prompt.split([_FEW_POSITIONS - 9, 8, 1])
        with subject.open(directory) as model:
            found = model(input_ids=prompt[None]).logits[0]
            same_bits(found, reference.run(prompt), f"{told}: logits of a prompt that fills it")
            with refused(InputError, f"{told}: a prompt of one token more"):
                model(input_ids=torch.cat([prompt, prompt[:1]])[None])
            cache = model.new_cache()
            found = run_pieces(model, pieces, cache)
            same_bits(found, reference.run_pieces(pieces), f"{told}: logits of a text that grew")
            for count in (1, 5):
                with refused(InputError, f"{told}: {count} tokens after as many as it has"):
                    model(input_ids=prompt[None, :count], past_key_values=cache)
                length = cache.get_seq_length()
                assert length == _FEW_POSITIONS, (
                    f"{told}: expected all in the cache after a refusal, got {length}"
                )
            tokens = greedy(model, pieces[0], 10)[0]  # the last one of them is not read
            same_tokens(tokens, reference.greedy(pieces[0], 10)[0], f"{told}: generated tokens")
            with refused(InputError, f"{told}: 12 new tokens after {len(pieces[0])}"):
                greedy(model, pieces[0], 12)
            if supports(subject.adapter, "batch"):
                for full in (0, 1):
                    rows = [prompt, prompt[:20]] if full == 0 else [prompt[:20], prompt]
                    ids, mask = left_padded(rows)
                    cache = model.new_cache()
                    model(input_ids=ids, attention_mask=mask, past_key_values=cache)
                    what = f"{told}: a token after a batch whose row {full} fills it"
                    with refused(InputError, what):
                        model(input_ids=ids[:, :1], past_key_values=cache)
                    cache.close()


def _windows(subject: Subject) -> list[int]:
    """Of the sliding layers. Ends the check if there are none."""
    config = subject.config
    windows = sorted({k.window for k in subject.adapter.caches(config) if k.window is not None})
    if not windows:
        does_not_apply("no layer has a window")
    positions = int(model_config(config).get_text_config().max_position_embeddings)
    assert 2 * windows[-1] + _FAR + 30 <= positions, (
        f"tiny_config(): expected windows that are crossed twice in {positions} positions, "
        f"got {windows}"
    )
    return windows


def _long_model(subject: Subject) -> Path:
    """A tiny model with enough positions, and no more layers than show every kind of cache."""
    config = subject.config
    changes: dict[str, Any] = {}
    if "max_position_embeddings" in config:
        changes["max_position_embeddings"] = max(_LONG + 120, config["max_position_embeddings"])
    kinds = subject.adapter.caches(config)
    num_layers = 1 + max(kinds.index(kind) for kind in kinds)
    fewer: dict[str, Any] = {"num_hidden_layers": num_layers}
    if isinstance(config.get("layer_types"), list):
        fewer["layer_types"] = config["layer_types"][:num_layers]
    if list(subject.adapter.caches({**config, **fewer})) == list(kinds[:num_layers]):
        changes |= fewer
    return subject.tiny(changes=changes)
