"""Checks of layers with a sliding window, which let go of what no token will see again."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import pytest
import torch
from torch import Tensor

from ollm_conformance.checks import UNSUPPORTED, check
from ollm_conformance.compare import same_bits
from ollm_conformance.parts.base import refusal
from ollm_conformance.parts.kv_machine import OpenStore
from ollm_conformance.parts.kv_suite import KVStoreSuite
from ollm_conformance.parts.lists import KVShape
from ollm_core import KVStoreError

WINDOW = 10
SLIDING = KVShape(windows=(None, WINDOW))
"""A layer that keeps all, and one whose window ends inside a block."""
PASSES: tuple[tuple[tuple[int, ...], ...], ...] = (
    ((WINDOW,), (2,), (1,), (2,)),
    ((WINDOW,), (WINDOW + 1,), (WINDOW + 1,), (2,)),
    ((3 * WINDOW + 5,), (1,), (WINDOW + 1,), (2,), (2,)),
    ((WINDOW + 1, WINDOW + 1, 3), (2,), (4, 4), (1,)),
    (*(((1,),) * 27), (2,), (WINDOW + 1,)),
)
"""Chunks of the passes of one sequence each."""


class Text:
    """One sequence of a store and all that it was ever given, which the store may not have kept."""

    def __init__(self, opened: OpenStore) -> None:
        shape = opened.shape
        self.opened = opened
        self.sequence = opened.store.new_sequence()
        self.layers: list[Tensor] = [shape.random(0, 0)] * shape.num_layers
        self._seed = 0

    @property
    def num_tokens(self) -> int:
        """Of the layer that has fewest."""
        return min(layer.shape[2] for layer in self.layers)

    def chunk(self, layer_idx: int, num_tokens: int, what: str) -> None:
        """Append, and compare what attention would be given: before it, and with the new tokens."""
        start = self.layers[layer_idx].shape[2]
        self.see(layer_idx, start, start, f"{what}, before {num_tokens} tokens after {start}")
        self._seed += 1
        new = self.opened.append(layer_idx, self.sequence, num_tokens, self._seed)
        self.layers[layer_idx] = torch.cat([self.layers[layer_idx], new], dim=2)
        end = start + num_tokens
        self.see(layer_idx, start, end, f"{what}, with {num_tokens} tokens after {start}")

    def see(self, layer_idx: int, start: int, end: int, what: str) -> None:
        """Raises AssertionError unless the store gives what a token at `start` and those up to
        `end` may see.
        """
        window = self.opened.shape.kinds[layer_idx].window
        first = 0 if window is None else max(start - window + 1, 0)
        told = f"{what}: positions {first} to {end} of layer {layer_idx}"
        blocks = self.opened.store.blocks
        try:
            found = self.opened.shape.join(blocks(layer_idx, self.sequence, end, first))
        except KVStoreError as error:
            raise AssertionError(f"{told}: expected keys and values, got {error}") from error
        same_bits(found, self.layers[layer_idx][:, :, first:end], told)

    def run(self, chunks: Sequence[int], what: str, num_layers: int | None = None) -> None:
        """One pass, through all layers or the first ones only, in room that is reserved first."""
        self.opened.store.reserve(self.sequence, self.num_tokens + sum(chunks))
        for layer_idx in range(num_layers or self.opened.shape.num_layers):
            for length in chunks:
                self.chunk(layer_idx, length, what)

    def cut(self, num_tokens: int, what: str) -> None:
        """Truncate, and compare what is left."""
        self.opened.store.truncate(self.sequence, num_tokens)
        self.layers = [layer[:, :, :num_tokens] for layer in self.layers]
        for layer_idx in range(len(self.layers)):
            self.see(layer_idx, num_tokens, num_tokens, what)

    def fork(self) -> Text:
        """One that goes on from here."""
        forked = Text(self.opened)
        self.opened.store.release(forked.sequence)
        forked.sequence = self.opened.store.fork(self.sequence)
        forked.layers, forked._seed = list(self.layers), 1000
        return forked


class KVSliding(KVStoreSuite):
    """A window is always there whole, and nothing else need be."""

    @check(
        "kv-store.window",
        "A layer with a window has all that the next tokens may see: one or two after a full "
        "window, a chunk that is longer than it, a fork.",
        look="which blocks a sliding layer lets go of, and when: the window counts from the first "
        "token of a chunk",
    )
    def test_window(self) -> None:
        self._must_slide()
        for passes in PASSES:
            with self.opened(SLIDING) as opened:
                text = Text(opened)
                for number, chunks in enumerate(passes):
                    text.run(chunks, f"pass {number + 1} of {passes}")
                    opened.store.commit(text.sequence)
                fork = text.fork()
                for one in (fork, text):
                    for chunks in ((2,), (WINDOW + 1,), (1,)):
                        one.run(chunks, f"a fork after {passes}")
                        opened.store.commit(one.sequence)

    @check(
        "kv-store.window-undo",
        "A pass that is not committed is undone, however much longer than the window it was; "
        "what was let go of by an earlier one is refused, never given wrong.",
        look="truncate(), and what reserve() holds back until commit()",
    )
    def test_window_undo(self) -> None:
        self._must_slide()
        for start in (3, WINDOW, 4 * WINDOW + 1):
            for chunks in ((2,), (WINDOW + 1,), (WINDOW, WINDOW, WINDOW + 3)):
                for num_layers in (1, 2):
                    with self.opened(SLIDING) as opened:
                        what = f"undoing {chunks} after {start}"
                        text = Text(opened)
                        text.run((start,), what)
                        opened.store.commit(text.sequence)
                        text.run(chunks, what, num_layers)
                        try:
                            text.cut(start, what)
                        except KVStoreError as error:
                            raise AssertionError(
                                f"{what}: expected it undone, got {error}"
                            ) from error
                        text.run((2, WINDOW + 1), f"after {what}")
                        opened.store.commit(text.sequence)
                        self._go_back(text, start // 2, what)

    @check(
        "kv-store.window-bytes",
        "What a layer with a window holds does not grow with the text, and positions that it has "
        "let go of are refused.",
        look="append() and commit(): blocks that are behind the window; blocks(): first",
    )
    def test_window_bytes(self) -> None:
        self._must_slide()
        window, step, num_passes = 40, 20, 60
        shape = KVShape(1, 2, 64, torch.float32, 16, (window,))
        with self.opened(shape) as opened:
            text, empty = Text(opened), opened.store.tier_bytes()
            for number in range(num_passes):
                text.run((step,), f"pass {number + 1}")
                opened.store.commit(text.sequence)
            told = opened.store.tier_bytes()
            held = told.device + told.host + told.disk - empty.device - empty.host - empty.disk
            most = (window + step + 6 * shape.block_size) * shape.token_bytes
            assert held <= most, (
                f"a window of {window} after {num_passes * step} tokens: expected at most {most} "
                f"bytes held, got {held}"
            )
            first = partial(opened.store.blocks, 0, text.sequence, num_passes * step, 0)
            refusal(KVStoreError, lambda: list(first()), "positions from 0 on")

    @classmethod
    def _must_slide(cls) -> None:
        if not cls.slides:
            pytest.skip(f"{UNSUPPORTED}layers that let go of what is before their window")

    @staticmethod
    def _go_back(text: Text, num_tokens: int, what: str) -> None:
        """Truncate to where the store need not be able to go: it does so right, or not at all."""
        store, before = text.opened.store, text.num_tokens
        told = f"truncating to {num_tokens} tokens of {before} after {what}"
        refused = ""
        try:
            text.cut(num_tokens, told)
        except KVStoreError as error:
            refused = str(error)
        if refused:
            assert "\n" not in refused, f"{told}: expected one line, got {refused}"
            found = store.num_tokens(text.sequence)
            assert found == before, f"{told}: expected {before} tokens still, got {found}"
            for layer_idx in range(text.opened.shape.num_layers):
                text.see(layer_idx, before, before, f"after refusing {told}")
        text.run((2,), f"after {told}")
