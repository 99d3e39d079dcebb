"""Checks of long prompts that were broken off, and are gone on with by another run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ollm_conformance.adapter.base import AdapterSuite
from ollm_conformance.checks import check, does_not_apply
from ollm_conformance.compare import refused, same_bits, same_within
from ollm_conformance.held import same_lengths
from ollm_conformance.subject import PROMPT, Subject, run_pieces
from ollm_core.testing import Progress, SequenceCache, StreamedModel, save_each_layer, supports

_PIECES = [PROMPT, 1, 1, 1]
"""A prompt of more than two blocks of KV, and what is read of them by later passes."""
_FEWER = [280, 1, 1, 1]
"""More than one block: in half precision, which takes long to compute on many a processor."""
_OTHER_CHUNK = 128


class Resumed(AdapterSuite):
    """What a broken off prompt has left on disk."""

    @check(
        "failure.resumed",
        "A long prompt that was broken off after any of its layers, by Ctrl-C or because the "
        "process was killed, is gone on with from that layer, and it and what follows it have the "
        "bits of a run that was not; with other chunks, or another end, it begins anew.",
        look="caches(): states of a layer that are not declared; layout(): what layers hand on "
        "beside hidden states",
        needs=["kv-disk"],
    )
    @pytest.mark.parametrize(("dtype", "attention"), [("float32", "exact"), ("bfloat16", "auto")])
    def test_resumed(self, subject: Subject, dtype: str, attention: str) -> None:
        if not any(kind.num_kv_heads for kind in subject.adapter.caches(subject.config)):
            does_not_apply("no layer has keys and values")
        lengths = _PIECES if dtype == "float32" else _FEWER
        pieces = subject.prompt(sum(lengths)).split(lengths)
        options: dict[str, Any] = {"kv": "disk", "keep_kv": True, "attention": attention}
        directory = subject.tiny(dtype)
        with subject.open(directory, **options) as model:
            if not save_each_layer(model):
                does_not_apply("its layers hand on more than hidden states")
            states = _States(subject)
            model.on_progress(states.take)
            cache = model.new_cache(kv_dir=states.directory)
            expected = run_pieces(model, pieces, cache)
            model.on_progress(None)
            num_layers = len(cache)
            cache.close()
        if attention == "exact":
            same_bits(expected, subject.reference(dtype).run_pieces(pieces), "logits, not broken")
        saved = sorted(states.at)
        assert saved == list(range(1, num_layers + 1)), (
            f"expected a pass to save each of its {num_layers} layers, got {saved}"
        )
        unused = [subject.copy(states.at[max(num_layers - 1, 1)]) for _ in range(2)]
        with subject.open(directory, **options) as model:
            save_each_layer(model)
            for num_done, left in states.at.items():
                what = f"in {dtype}, killed after {num_done} of {num_layers} layers"
                cache = model.new_cache(kv_dir=left)
                found = _go_on(model, pieces, cache, num_done, what)
                same_bits(found, expected, f"logits of a prompt {what}")
                cache.close()
            self._broken_off(subject, model, pieces, expected, dtype)
        if attention == "exact" and supports(subject.adapter, "chunked-prefill"):
            self._otherwise(subject, directory, pieces[0], unused, options)

    @staticmethod
    def _broken_off(
        subject: Subject,
        model: StreamedModel,
        pieces: tuple[Tensor, ...],
        expected: Tensor,
        dtype: str,
    ) -> None:
        """Ctrl-C in a pass, then in the one that goes on with it, and again in the same cache."""
        cache = model.new_cache(kv_dir=subject.new_directory())
        num_done = 0
        for stop in dict.fromkeys((1, max(len(cache) - 1, 1))):
            what = f"in {dtype}, broken off after {stop} of {len(cache)} layers"
            model.on_progress(_stop_at(stop))
            with refused(KeyboardInterrupt, what):
                model(input_ids=pieces[0][None], past_key_values=cache)
            model.on_progress(None)
            same_lengths(cache.store, cache.rows, [0] * len(cache.rows), len(cache), what)
            num_done = stop
        found = _go_on(model, pieces, cache, num_done, what)
        same_bits(found, expected, f"logits of a prompt {what}")
        cache.close()

    @staticmethod
    def _otherwise(
        subject: Subject, directory: Path, prompt: Tensor, left: list[Path], options: dict[str, Any]
    ) -> None:
        """What was left is of no use to other chunks, nor to a prompt with another end."""
        reference = subject.reference(directory=directory)
        with subject.open(directory, chunk_size=_OTHER_CHUNK, **options) as model:
            save_each_layer(model)
            cache = model.new_cache(kv_dir=left[0])
            found = model(input_ids=prompt[None], past_key_values=cache).logits[0]
        same_bits(
            found, reference.run(prompt, _OTHER_CHUNK),
            "logits in other chunks than those of the prompt that was broken off",
        )  # fmt: skip
        other = torch.cat([prompt[:-9], subject.prompt(9, seed=1)])
        with subject.open(directory, **options) as model:
            save_each_layer(model)
            cache = model.new_cache(kv_dir=left[1])
            found = model(input_ids=other[None], past_key_values=cache, logits_to_keep=1).logits[0]
        same_within(
            found, reference.run(other, last_only=True), 1e-4,
            "logits of a prompt that ends otherwise than the one that was broken off",
        )  # fmt: skip


class _States:
    """Copies of a KV directory after each layer: what is left of a process that is killed then."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self.directory = subject.new_directory()
        self.at: dict[int, Path] = {}

    def take(self, progress: Progress) -> None:
        """Called with each report of progress."""
        if progress.saved_layers and progress.saved_layers not in self.at:
            self.at[progress.saved_layers] = self._subject.copy(self.directory)


def _stop_at(num_done: int) -> Callable[[Progress], None]:
    def stop(progress: Progress) -> None:
        if progress.saved_layers >= num_done:
            raise KeyboardInterrupt

    return stop


def _go_on(
    model: StreamedModel,
    pieces: tuple[Tensor, ...],
    cache: SequenceCache,
    num_done: int,
    what: str,
) -> Tensor:
    """Logits [T, V] of all pieces, the first of which must begin after so many layers."""
    resumed: list[int] = []
    model.on_progress(lambda progress: resumed.append(progress.resumed_layers))
    found = run_pieces(model, pieces, cache)
    model.on_progress(None)
    assert max(resumed) == num_done, (
        f"{what}: expected {num_done} layers not to be computed again, got {max(resumed)}"
    )
    return found
