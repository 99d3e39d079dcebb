"""Steps of a walk that generate: where texts end, with drafts and without, and broken off."""

from __future__ import annotations

import random
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models
from torch import Tensor
from transformers import PreTrainedTokenizerFast, StoppingCriteria, StoppingCriteriaList

from ollm_conformance.broken_off import interrupt_at
from ollm_conformance.compare import refused
from ollm_conformance.subject import generate
from ollm_conformance.walk.rows import Row, compare
from ollm_conformance.walk.rows_steps import RowSteps
from ollm_conformance.walk.world import Slot

_TIE = 1e-4
"""Of the scale of the logits: two tokens so near are equally likely."""


class EndsWith(StoppingCriteria):
    """Ends a text where its last token is one of these, and looks nowhere else, as stop strings."""

    def __init__(self, stops: list[int]) -> None:
        self._stops = torch.tensor(stops)

    def __call__(self, ids: Tensor, scores: Any, **_: Any) -> Any:
        return torch.isin(ids[:, -1], self._stops)


class Foresight:
    """A draft source that knows what a text goes on with, or is wrong at some places."""

    def __init__(self, num_before: int, tokens: Tensor) -> None:
        self._num_before = num_before
        self._tokens = tokens

    def __call__(self, token_ids: Tensor, num_tokens: int) -> Tensor:
        return self._tokens[max(len(token_ids) - self._num_before, 0) :][:num_tokens]


class TextSteps(RowSteps):
    """`generate`, in every way that ends a text."""

    def write(self, draw: random.Random) -> None:
        """Generate after new columns, on a cache or without one."""
        if slot := self.pick(draw):
            self._write_on(draw, slot, drafting=draw.random() < 0.3)

    def draft(self, draw: random.Random) -> None:
        """The same of one row, with drafts, if the family may draft."""
        slot = self.pick(draw)
        if slot and len(slot.rows) > 1:
            self.reset_slot(slot)
        if slot:
            self._write_on(draw, slot, drafting=True)
            if slot in self.slots:
                self.go_on(draw, slot)

    def _write_on(self, draw: random.Random, slot: Slot, *, drafting: bool) -> None:
        ids, mask = self.given(draw, slot)
        drafting = drafting and self.can("drafts") and self.can("truncate") and len(slot.rows) < 2
        if drafting:
            ids, mask = ids[:1], mask[:1]
        ids, mask = ids[:, -40:], mask[:, -40:].clone()
        mask[:, -1] = 1
        if not slot.rows and draw.random() < 0.7:  # as a tokenizer pads
            mask = mask.cumsum(1).clamp(max=1)
        num_new = (3 if drafting else 1) + draw.randrange(5)
        chains = self._continued(slot, ids, mask, num_new)
        options, drafts = self._ends(draw, slot, chains, ids, drafting=drafting)
        self.told = (
            f"generate {num_new} after {self.shape(mask)} on {self.name(slot)}, ended by "
            f"{self._how} {self._stop_tokens or ''}" + (f", drafts by {drafts}" if drafts else "")
        )
        if not drafts and draw.random() < 0.3:
            self._break_off(draw, slot, ids, mask, num_new)
        self._write(slot, ids, mask, chains, num_new, options, drafts)

    def _continued(
        self, slot: Slot, ids: Tensor, mask: Tensor, num_new: int
    ) -> list[list[tuple[Row, Tensor]]]:
        """Of each row, what it is after new columns and after each greedy token, with the logits
        [1, V] of what follows.
        """
        chains = []
        for row, new in enumerate(self.real(ids, mask)):
            begun = slot.rows[row] if slot.rows else Row(self.reference)
            chain = [begun.then(new, exact=len(ids) == 1, last_only=True)]
            while len(chain) < num_new:
                grown, logits = chain[-1]
                chain.append(grown.then(logits[-1:].argmax(-1), exact=len(ids) == 1))
            chains.append(chain)
        return chains

    def _ends(
        self,
        draw: random.Random,
        slot: Slot,
        chains: list[list[tuple[Row, Tensor]]],
        ids: Tensor,
        *,
        drafting: bool,
    ) -> tuple[dict[str, Any], str]:
        """Options of what ends the text, and how it is drafted."""
        likely = [int(logits.argmax()) for _, logits in draw.choice(chains)]
        stops = sorted({draw.choice(likely), 5 + draw.randrange(self.subject.vocab_size - 5)})
        draw.shuffle(stops)
        options: dict[str, Any] = {}
        how = draw.choice(["length", "one", "list", "strings", "criteria"])
        self._how = how
        self._stop_tokens = [] if how == "length" else stops
        if how == "one":
            self._stop_tokens = stops = [draw.choice(likely)]
            options["eos_token_id"] = stops[0]
        elif how == "list":
            options["eos_token_id"] = stops
        elif how == "strings":
            options |= {
                "stop_strings": self.tokenizer.convert_ids_to_tokens(stops),
                "tokenizer": self.tokenizer,
            }
        elif how == "criteria":
            options["stopping_criteria"] = StoppingCriteriaList([EndsWith(stops)])
        drafts = ""
        if drafting:
            drafts = draw.choice(["lookup", "foresight", "foresight"])
            if drafts == "lookup":
                options["prompt_lookup_num_tokens"] = 1 + draw.randrange(4)
            else:
                tokens = torch.tensor(likely)
                place = draw.randrange(2 * len(tokens))
                tokens[place : place + 1] -= 1  # a wrong one
                width = ids.shape[1] + (slot.mask.shape[1] if slot.rows else 0)
                self.model.draft_with(Foresight(width, tokens), 1 + draw.randrange(6))
                drafts = "foresight" if place < len(tokens) else "right foresight"
        return options, drafts

    @property
    def tokenizer(self) -> Any:
        """One whose token `n` is `<n>`."""

        def make() -> Any:
            words = {f"<{number}>": number for number in range(self.subject.vocab_size)}
            del words["<1>"]
            words["abcdef"] = 1  # by which transformers sees what tokenizers put before a word
            tokenizer = Tokenizer(models.WordLevel(words, unk_token="<0>"))
            tokenizer.decoder = decoders.Fuse()
            return PreTrainedTokenizerFast(tokenizer_object=tokenizer)

        return self.subject.once(("tokenizer of walks",), make)

    def _whole(self, slot: Slot, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """All columns, as `generate` takes them."""
        if not slot.rows:
            return ids, mask
        return torch.cat([slot.ids, ids], 1), self.whole_mask(slot, mask)

    def _break_off(
        self,
        draw: random.Random,
        slot: Slot,
        ids: Tensor,
        mask: Tensor,
        num_new: int,
    ) -> None:
        """Ctrl-C in the first pass; then nothing is stored."""
        whole, whole_mask = self._whole(slot, ids, mask)
        self.model.on_progress(interrupt_at(draw.choice([0.0, 0.5, 1.0])))
        with refused(KeyboardInterrupt, "`generate` with Ctrl-C in its first pass"):
            generate(
                self.model, whole, num_new, attention_mask=whole_mask, past_key_values=slot.cache
            )
        self.model.on_progress(None)
        if slot.rows:
            self.check()

    def _write(
        self,
        slot: Slot,
        ids: Tensor,
        mask: Tensor,
        chains: list[list[tuple[Row, Tensor]]],
        num_new: int,
        options: dict[str, Any],
        drafts: str,
    ) -> None:
        """Generate, and compare tokens, logits, and what the cache has."""
        whole, whole_mask = self._whole(slot, ids, mask)
        before = self.model.stats
        found = generate(
            self.model, whole, num_new, attention_mask=whole_mask, past_key_values=slot.cache,
            return_dict_in_generate=True, output_logits=True, **options,
        )  # fmt: skip
        self.model.draft_with(None)
        stats = self.model.stats
        cached = stats.cached_tokens - before.cached_tokens
        new = found.sequences[:, whole.shape[1] :]
        tokens = [[int(logits.argmax()) for _, logits in chain] for chain in chains]
        stops = self._stop_tokens
        ends = [next((i + 1 for i, t in enumerate(row) if t in stops), num_new) for row in tokens]
        length = max(ends)
        if options.get("eos_token_id") is None:
            ends = [length] * len(ends)  # rows that have ended go on as long as others
        for row, (got, wanted, end) in enumerate(zip(new.tolist(), tokens, ends, strict=True)):
            for place, (one, other) in enumerate(zip(got, wanted[:end], strict=False)):
                if one != other:
                    logits = chains[row][place][1][-1]
                    gap, scale = float(logits[other] - logits[one]), float(logits.abs().max())
                    if gap < _TIE * scale:
                        self.close_slot(slot)
                        return
                    raise AssertionError(f"row {row}, token {place}: expected {other}, got {one}")
        assert new.shape[1] == length, f"expected {length} tokens, got {new.shape[1]}"
        assert not any(bool(one[end:].any()) for one, end in zip(new, ends, strict=True)), (
            "expected padding after the end of a row, got tokens"
        )
        passes = stats.weight_passes - before.weight_passes
        assert passes == length or (drafts and passes <= length), (
            f"weight_passes: expected {length}, got {passes}"
        )
        assert drafts != "right foresight" or length < 3 or passes < length, (
            f"expected right drafts to be taken, got {passes} passes for {length} tokens"
        )
        exact = len(ids) == 1 and not drafts and not cached
        for row, (chain, end) in enumerate(zip(chains, ends, strict=True)):
            for place in range(end):
                grown, logits = chain[place]
                compare(
                    found.logits[place][row : row + 1], logits[-1:],
                    f"row {row}: logits behind token {place}", exact=exact and grown.exact,
                )  # fmt: skip
        self._stored(slot, ids, mask, chains, new, ends, exact=exact)

    def _stored(
        self,
        slot: Slot,
        ids: Tensor,
        mask: Tensor,
        chains: list[list[tuple[Row, Tensor]]],
        new: Tensor,
        ends: list[int],
        *,
        exact: bool,
    ) -> None:
        """Note that the cache has the text but for its last token."""
        rows = []
        num_stored = new.shape[1] - 1
        for row, (chain, end) in enumerate(zip(chains, ends, strict=True)):
            grown = chain[min(num_stored, end - 1)][0]
            for place in range(end - 1, num_stored):
                grown = grown.then(new[row, place : place + 1], exact=False)[0]
            begun = len(slot.rows[row].pieces) if slot.rows else 0
            rows.append(grown if exact else grown.inexact(begun))
        stored = torch.cat([ids, new[:, :num_stored]], 1)
        stored_mask = torch.cat([mask, torch.ones_like(new[:, :num_stored])], 1)
        self.grow(slot, rows, stored, stored_mask)
        slot.fresh = False
