"""Steps of a walk on single sequences of a store, which the engine runs in any combination."""

from __future__ import annotations

import random

from ollm_conformance.walk.rows import Row, compare
from ollm_conformance.walk.text_steps import TextSteps
from ollm_conformance.walk.world import Slot
from ollm_core import KVStoreError
from ollm_core.testing import NewTokens


class SequenceSteps(TextSteps):
    """Sequences that come, go on, part and go, each by itself."""

    def _pick(self, draw: random.Random) -> Slot:
        """A cache that is used by sequence."""
        slots = [slot for slot in self.slots if slot.sequences]
        slots += [slot for slot in self.slots if not slot.rows and not slot.cache.rows]
        if not slots or (len(self.slots) < 4 and draw.random() < 0.15):
            return self.new_slot(draw)
        return slots[0]

    def run(self, draw: random.Random) -> None:
        """A pass over some of them, each with its own number of tokens, some of which are
        drafted and may be dropped again.
        """
        slot = self._pick(draw)
        store = slot.cache.store
        most = 3 if self.can("batch") else 1
        count = min(len(slot.sequences), 1 + draw.randrange(most))
        chosen = draw.sample(list(slot.sequences), count)
        chosen = [one for one in chosen if len(slot.sequences[one]) < self.longest]
        if len(chosen) < most and len(slot.sequences) < 5 and (not chosen or draw.random() < 0.4):
            chosen.append(self._new(slot))
        if not chosen:
            store.release(sequence := next(iter(slot.sequences)))
            del slot.sequences[sequence]
        else:
            self._run_on(draw, slot, chosen)

    def _new(self, slot: Slot) -> int:
        sequence = slot.cache.store.new_sequence()
        slot.sequences[sequence] = Row(self.reference)
        return sequence

    def _begin(self, draw: random.Random, slot: Slot) -> None:
        """A first sequence, with some tokens."""
        self._run_on(draw, slot, [self._new(slot)])

    def _run_on(self, draw: random.Random, slot: Slot, chosen: list[int], most: int = 0) -> None:
        """A pass over these, at most so many tokens of each."""
        store = slot.cache.store
        work, logits, drafted = [], [], {}
        single = len(chosen) == 1
        for sequence in chosen:
            row = slot.sequences[sequence]
            count = draw.choice([1, 1, 1 + draw.randrange(6), self.length(draw)])
            if not len(row) and self.longest >= 300 and draw.random() < 0.35:
                count = 257 + draw.randrange(30)  # a block of KV, which forks share
            count = min(count, most) if most else count
            drafts = self.can("drafts") and len(row) and 1 < count < 7 and draw.random() < 0.6
            ids = self.tokens(draw, count)
            number = count if drafts or draw.random() < 0.7 else 1
            work.append(NewTokens(sequence, ids, len(row), number, count - 1 if drafts else 0))
            grown, expected = row.then(ids, exact=single and not drafts, last_only=number == 1)
            if drafts:
                drafted[sequence] = len(row) + 1 + draw.randrange(count)
            slot.sequences[sequence] = grown
            logits.append(expected[-number:])
        told = ", ".join(
            f"{len(item.token_ids)} after {item.start}" + (" drafted" if item.num_drafted else "")
            for item in work
        )
        self.told += f"pass over sequences of {slot.name} ({slot.tier}): {told}"
        found = self.model.engine.run(store, work)
        for item, got, expected in zip(work, found, logits, strict=True):
            exact = single and slot.sequences[item.sequence].exact
            compare(got, expected, f"sequence of {item.start} tokens: logits", exact=exact)
        for sequence, length in drafted.items():
            if length < len(slot.sequences[sequence]) and self.can("truncate"):
                self.told += f", then cut to {length}"
                store.truncate(sequence, length)
                slot.sequences[sequence] = slot.sequences[sequence].cut(length)
        slot.fresh = True

    def part(self, draw: random.Random) -> None:
        """A fork of one, at its end or earlier."""
        slot = self._pick(draw)
        if len(slot.sequences) > 5:
            return
        if not slot.sequences:
            self._begin(draw, slot)
            self.told += ", then "
        sequence = draw.choice(list(slot.sequences))
        row = slot.sequences[sequence]
        earlier = draw.choice([len(row) - row.last, draw.randrange(len(row) + 1)])
        length = len(row) if draw.random() < 0.7 else earlier
        self.told += f"fork of {len(row)} tokens at {length} in {slot.name} ({slot.tier})"
        try:
            forked = slot.cache.store.fork(sequence, length)
        except KVStoreError as error:
            if self.may_go_back(row, length, fresh=False):
                raise AssertionError(f"expected a fork, got: {error}") from error
            return
        slot.sequences[forked] = row.cut(length)
        both = [sequence, sequence, forked] if draw.random() < 0.5 else [forked, forked, sequence]
        for one in both if len(row) and draw.random() < 0.9 else ():
            self.told += ", then "
            self._run_on(draw, slot, [one], most=2)

    def back(self, draw: random.Random) -> None:
        """One is cut."""
        slot = self._pick(draw)
        if not slot.sequences or not self.can("truncate"):
            return
        sequence = draw.choice(list(slot.sequences))
        row = slot.sequences[sequence]
        length = draw.choice(
            [len(row) - row.last, max(len(row) - 1, 0), draw.randrange(len(row) + 1)]
        )
        self.told = f"cut of {len(row)} tokens to {length} in {slot.name} ({slot.tier})"
        try:
            slot.cache.store.truncate(sequence, length)
        except KVStoreError as error:
            if self.may_go_back(row, length, fresh=False):
                raise AssertionError(f"expected a cut, got: {error}") from error
            return
        slot.sequences[sequence] = row.cut(length)

    def drop(self, draw: random.Random) -> None:
        """One is released; sometimes all are."""
        slot = self._pick(draw)
        for sequence in list(slot.sequences):
            if draw.random() < 0.4:
                self.told = f"release a sequence of {slot.name} ({slot.tier})"
                slot.cache.store.release(sequence)
                slot.cache.store.release(sequence)  # is ignored
                del slot.sequences[sequence]
