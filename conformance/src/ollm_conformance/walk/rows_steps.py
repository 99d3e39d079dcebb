"""Steps of a walk on rows of a batch, through the face that transformers sees."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

from ollm import Stats
from ollm_conformance.broken_off import interrupt_at
from ollm_conformance.compare import refused
from ollm_conformance.walk.rows import Row, compare
from ollm_conformance.walk.world import Slot, World
from ollm_core import InputError, KVStoreError, ReadError
from ollm_core.testing import failing_reads


class RowSteps(World):
    """A pass, and all that may be done to the rows of a cache."""

    def pick(self, draw: random.Random, *, begun: bool = False) -> Slot | None:
        """A cache of rows, maybe a new one; with `begun` one that has rows, if there is one."""
        slots = [slot for slot in self.slots if not slot.sequences and (slot.rows or not begun)]
        new = not begun and len(self.slots) < 4 and (not slots or draw.random() < 0.25)
        slot = self.new_slot(draw) if new else draw.choice(slots) if slots else None
        if slot and slot.mask.shape[1] > self.longest:
            self.close_slot(slot)
            return None
        return slot

    def given(self, draw: random.Random, slot: Slot) -> tuple[Tensor, Tensor]:
        """New columns for a cache: ids and mask, [B, T]."""
        if slot.rows:
            num_rows, num_new = len(slot.rows), 1 if draw.random() < 0.5 else self.length(draw)
            lengths = [num_new] * num_rows
        else:
            num_rows = draw.choice([1, 1, 2, 3]) if self.can("batch") else 1
            lengths = [self.length(draw) for _ in range(num_rows)]
        width = max(lengths)
        ids, mask = torch.zeros(num_rows, width, dtype=torch.long), torch.ones(num_rows, width)
        right = draw.random() < 0.3
        for row, length in enumerate(lengths):
            ids[row] = self.tokens(draw, width)
            if right:
                mask[row, length:] = 0
            else:
                mask[row, : width - length] = 0
            if width > 1 and draw.random() < 0.2:
                hole = draw.randrange(width)
                mask[row, hole : hole + 3] = 0
            if not mask[row].any():
                mask[row, draw.randrange(width)] = 1
        return ids, mask.long()

    def say(self, draw: random.Random) -> None:
        """A pass over all rows."""
        if (slot := self.pick(draw)) is None:
            return
        ids, mask = self.given(draw, slot)
        columns = torch.tensor([draw.randrange(ids.shape[1]) for _ in range(2)])
        choices: list[int | Tensor] = [0, 0, 0, int(bool(mask[:, -1].all())), columns]
        keep = draw.choice(choices)
        told = keep.tolist() if isinstance(keep, Tensor) else keep or "all"
        self.told = f"pass over {self.shape(mask)} on {self.name(slot)}, logits: {told}"
        self.forward(slot, ids, mask, keep)

    def forward(self, slot: Slot, ids: Tensor, mask: Tensor, keep: int | Tensor) -> None:
        """The same with these columns."""
        before, known = self.model.stats, [self.kept[:], [*slot.rows]]
        given = ids.clone(), self.whole_mask(slot, mask)
        found = self.model(
            input_ids=given[0], attention_mask=given[1].clone(), past_key_values=slot.cache,
            logits_to_keep=keep,
        ).logits  # fmt: skip
        assert torch.equal(given[0], ids), "expected input_ids as they were given, got others"
        stats = self.model.stats
        cached = stats.cached_tokens - before.cached_tokens
        self.counted(before, stats, int(mask.sum()), len(ids), cached)
        single = len(ids) == 1
        rows, logits = [], []
        for row, new in enumerate(self.real(ids, mask)):
            begun = slot.rows[row] if slot.rows else Row(self.reference)
            grown, expected = begun.then(
                new, exact=single and not cached, last_only=isinstance(keep, int) and keep == 1
            )
            rows.append(grown)
            logits.append(expected)
        if cached:
            assert not known[1], f"expected nothing of other runs in a cache in use, got {cached}"
            most = sum(self.at_most_kept(row.ids) for row in rows) if slot.tier == "disk" else 0
            assert cached <= most, f"cached_tokens: expected at most {most}, got {cached}"
        exact = isinstance(keep, int) and rows[0].exact and single
        self.same_logits(found, logits, mask, keep, exact=exact)
        self.grow(slot, rows, ids, mask)

    def same_logits(
        self, found: Tensor, logits: Sequence[Tensor], mask: Tensor, keep: int | Tensor, *,
        exact: bool,
    ) -> None:  # fmt: skip
        """Compare those of a pass, [B, n, V], with what each row has at its tokens."""
        for row, (got, expected) in enumerate(zip(found, logits, strict=True)):
            if isinstance(keep, int) and keep:
                compare(got, expected, f"row {row}: logits of its last token", exact=exact)
                continue
            wanted = expected.new_zeros(mask.shape[1], expected.shape[1])
            wanted[mask[row].bool()] = expected
            if isinstance(keep, Tensor):
                wanted = wanted[keep]
                if not bool(wanted.any()):
                    assert not bool(got.any()), f"row {row}: expected zeros at padding"
                    continue
            compare(got, wanted, f"row {row}: logits", exact=exact)

    @staticmethod
    def counted(before: Stats, stats: Stats, num_tokens: int, num_rows: int, cached: int) -> None:
        """One pass must have been counted, and its tokens."""
        passes = stats.weight_passes - before.weight_passes
        assert passes == 1, f"weight_passes: expected one more, got {passes}"
        drafted = stats.drafted_tokens - before.drafted_tokens
        assert not drafted, f"drafted_tokens: expected none in a plain pass, got {drafted}"
        prefill = stats.prefill_tokens - before.prefill_tokens
        decode = stats.decode_tokens - before.decode_tokens
        assert (prefill == num_tokens - cached) != (decode == num_rows and not prefill), (
            f"expected {num_tokens - cached} tokens of a prompt counted or {num_rows} decoded, "
            f"got {prefill} and {decode}"
        )

    def grow(self, slot: Slot, rows: list[Row], ids: Tensor, mask: Tensor) -> None:
        """Note what a cache has now."""
        if not slot.rows:
            slot.ids, slot.mask = ids[:, :0], mask[:, :0]
        slot.rows, slot.fresh = rows, True
        slot.ids, slot.mask = torch.cat([slot.ids, ids], 1), torch.cat([slot.mask, mask], 1)
        self.remember(slot)

    def whole_mask(self, slot: Slot, mask: Tensor) -> Tensor:
        """That of all columns."""
        return torch.cat([slot.mask, mask], 1) if slot.rows else mask.clone()

    @staticmethod
    def real(ids: Tensor, mask: Tensor) -> list[Tensor]:
        """The tokens of each row."""
        return [row[kept] for row, kept in zip(ids, mask.bool(), strict=True)]

    @staticmethod
    def shape(mask: Tensor) -> str:
        """Told of new columns."""
        return f"{mask.sum(1).tolist()} tokens in {mask.shape[1]} columns"

    @staticmethod
    def name(slot: Slot) -> str:
        """Told of a cache."""
        return f"{slot.name} ({slot.tier}, {[len(row) for row in slot.rows]} tokens)"

    def broken_off(self, draw: random.Random) -> None:
        """A pass that is interrupted, or whose reads fail; then the same one, which must go on as
        if there had been none.
        """
        if (slot := self.pick(draw, begun=draw.random() < 0.7) or self.pick(draw)) is None:
            return
        ids, mask = self.given(draw, slot)
        if not slot.rows:
            ids, mask = ids[:, -60:], mask[:, -60:].clone()
            mask[:, -1] = 1
        options = {"attention_mask": self.whole_mask(slot, mask), "past_key_values": slot.cache}
        part, reads = draw.choice([0.0, 0.3, 0.6, 0.9, 1.0]), draw.randrange(2)
        if draw.random() < 0.5:
            self.told = f"pass over {self.shape(mask)} on {self.name(slot)}, Ctrl-C at {part}"
            self.model.on_progress(interrupt_at(part))
            with refused(KeyboardInterrupt, "a pass with Ctrl-C"):
                self.model(input_ids=ids, **options)
            self.model.on_progress(None)
        else:
            self.told = f"pass over {self.shape(mask)} on {self.name(slot)}, no read after {reads}"
            self.model.keep_layers(device=0)
            with failing_reads(self.model), suppress(ReadError):  # uses up what was read ahead
                for _ in range(3):
                    self.model(input_ids=ids[:1, :1])
            with (
                failing_reads(self.model, after=reads),
                refused(ReadError, "a pass whose reads fail"),
            ):
                self.model(input_ids=ids, **options)
            self.model.keep_layers()
        same = slot.rows or not slot.cache.rows or not any(
            slot.cache.num_tokens(row) for row in range(len(slot.cache.rows))
        )  # fmt: skip
        assert same, "expected no tokens in a cache whose first pass was broken off"
        if slot.rows:
            self.check()
        self.forward(slot, ids, mask, 0)

    def select(self, draw: random.Random) -> None:
        """Rows are copied, exchanged or dropped."""
        slot = self.pick(draw, begun=True)
        if slot is None or not self.can("batch"):
            return
        count, how = len(slot.rows), draw.choice(["repeat", "reorder", "pick"])
        if how == "repeat":
            times = 1 + draw.randrange(max(4 // count, 1))
            sources = [row for row in range(count) for _ in range(times)]
            slot.cache.batch_repeat_interleave(times)
        elif how == "reorder":
            sources = [draw.randrange(count) for _ in range(count)]
            slot.cache.reorder_cache(torch.tensor(sources))
        else:
            sources = [draw.randrange(count) for _ in range(1 + draw.randrange(3))]
            slot.cache.batch_select_indices(torch.tensor(sources))
        self.told = f"{how} rows {sources} of {self.name(slot)}"
        slot.rows = [slot.rows[row] for row in sources]
        slot.ids, slot.mask, slot.fresh = slot.ids[sources], slot.mask[sources], False
        self.go_on(draw, slot)

    def go_on(self, draw: random.Random, slot: Slot) -> None:
        """Often: a step of one or a few tokens on a cache of which something was done."""
        self.check()
        if slot.rows and draw.random() < 0.6:
            count = draw.choice([1, 1, 4])
            ids = torch.stack([self.tokens(draw, count) for _ in slot.rows])
            self.told += f", then {count} tokens more"
            self.forward(slot, ids, torch.ones_like(ids), 0)

    def crop(self, draw: random.Random) -> None:
        """The last columns are cut, as many as the family promises or more."""
        slot = self.pick(draw, begun=True)
        if slot is None or not self.can("truncate"):
            return
        many = [one for one in self.slots if len(one.rows) > 1]
        if many and draw.random() < 0.5:
            slot = draw.choice(many)
        width = slot.mask.shape[1]
        few, any_number = 1 + draw.randrange(8), 1 + draw.randrange(width)
        backs = [1, few, slot.rows[0].last or 1, any_number, width + draw.randrange(40)]
        back = draw.choice(backs)
        wanted = max(width - back, 0)
        lengths = slot.mask[:, :wanted].sum(1).tolist()
        self.told = f"cut {back} of {width} columns of {self.name(slot)}"
        promised = all(
            self.may_go_back(row, length, fresh=slot.fresh)
            for row, length in zip(slot.rows, lengths, strict=True)
        )
        try:
            slot.cache.crop(-back)
        except KVStoreError as error:
            if promised:
                raise AssertionError(f"expected this cut, got: {error}") from error
            self.told += " (refused)"
            return
        slot.fresh = False
        slot.rows = [row.cut(length) for row, length in zip(slot.rows, lengths, strict=True)]
        slot.ids, slot.mask = slot.ids[:, :wanted], slot.mask[:, :wanted]
        if not wanted:
            self.reset_slot(slot)
        self.go_on(draw, slot)

    def reset(self, draw: random.Random) -> None:
        """All rows are forgotten."""
        if slot := self.pick(draw, begun=True):
            self.told = f"reset {self.name(slot)}"
            self.reset_slot(slot)

    def reset_slot(self, slot: Slot) -> None:
        """The same of this cache."""
        slot.cache.reset()
        slot.rows, slot.ids, slot.mask = [], slot.ids[:0, :0], slot.mask[:0, :0]

    def leave(self, draw: random.Random) -> None:
        """A cache is closed; what was kept on disk is found by one that is opened after it."""
        slot = self.pick(draw, begun=True)
        if slot is None:
            return
        self.told = f"close {self.name(slot)}"
        row = max(slot.rows, key=len)
        self.close_slot(slot)
        if slot.tier != "disk" or not len(row):
            return
        self.told += (
            ", and come back for the longest of its rows"
            if len(slot.rows) > 1
            else ", and come back"
        )
        row = max(slot.rows, key=len)
        cache = self.model.new_cache(kv="disk")
        again = type(slot)(slot.name, cache, "disk", cache.store.tier_bytes())
        self.slots.append(again)
        rest = self.tokens(draw, 1 + draw.randrange(min(len(row), 20)))
        ids = torch.cat([row.ids, rest])[None]
        before = self.model.stats.cached_tokens
        self.forward(again, ids, torch.ones_like(ids), 1)
        cached = self.model.stats.cached_tokens - before
        assert cached >= len(row), f"expected {len(row)} tokens to be found again, got {cached}"

    def refuse(self, draw: random.Random) -> None:
        """What cannot be done is refused and changes nothing."""
        slot = self.pick(draw, begun=True)
        if slot is None:
            return
        ids, mask = self.given(draw, slot)
        whole = self.whole_mask(slot, mask)
        wrong = draw.choice(["a token", "rows", "a mask", "length"])
        self.told = f"{wrong} that cannot be, on {self.name(slot)}"
        if wrong == "a token":
            ids[-1, -1] = self.subject.vocab_size
        elif wrong == "rows":
            ids, whole = torch.cat([ids, ids[:1]]), torch.cat([whole, whole[:1]])
        elif wrong == "a mask":
            whole = whole[:, :-1] if slot.mask.shape[1] else whole[:, :0]
        else:
            ids = torch.full((len(ids), 1 << 18), 7)
            whole = torch.cat([slot.mask, torch.ones_like(ids)], 1)
        with refused(InputError, wrong):
            self.model(input_ids=ids, attention_mask=whole, past_key_values=slot.cache)

    def reopen(self, draw: random.Random) -> None:
        """The model is closed with its caches, and opened again."""
        self.told = f"close the model and {len(self.slots)} caches, and open it again"
        self.end()
        self.open()

    def hold(self, draw: random.Random) -> None:
        """More or fewer layers are kept in memory."""
        layers = draw.choice([None, 0, 1])
        self.told = f"keep {'as many layers as fit' if layers is None else layers} in memory"
        self.model.keep_layers(device=layers)

    def lose(self, draw: random.Random) -> None:
        """The loss of a batch, and of a part of a larger one."""
        num_rows = 2 if self.can("batch") and draw.random() < 0.5 else 1
        ids = torch.stack([self.tokens(draw, 12) for _ in range(num_rows)])
        labels = ids.clone()
        labels[0, : draw.randrange(10)] = -100
        items = draw.choice([5, 37, torch.tensor(23)])
        self.told = f"the loss of {num_rows} rows, num_items_in_batch {items}"
        with torch.no_grad():
            expected = self.reference.model(input_ids=ids, labels=labels, num_items_in_batch=items)
        found = self.model(input_ids=ids, labels=labels, num_items_in_batch=items)
        compare(found.loss[None], expected.loss[None], "loss", exact=False)
