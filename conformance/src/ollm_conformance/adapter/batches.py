"""Checks of several sequences in one weight pass, and of drafted tokens."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from ollm_conformance.adapter.base import AdapterSuite
from ollm_conformance.checks import check
from ollm_conformance.compare import refused, same_bits, same_tokens, same_within
from ollm_conformance.held import same_columns
from ollm_conformance.subject import Subject, generate, greedy, left_padded
from ollm_core import InputError
from ollm_core.testing import NewTokens, SequenceCache, StreamedModel, run_pass, supports

_LOOK = "caches() and, if declared, how the layer is split: positions and caches are per row"


class Batches(AdapterSuite):
    """What goes together gives what each gives alone."""

    @check(
        "batches.ragged",
        "Prompts, steps and drafts of any lengths in one pass give what each gives alone.",
        look=_LOOK,
        needs=["batch"],
    )
    def test_ragged(self, subject: Subject) -> None:
        lengths, news = (400, 310, 290, 290, 33), (400, 1, 1, 7, 33)
        prompts = [subject.prompt(n, seed=i) for i, n in enumerate(lengths)]
        with subject.open() as model:
            cache = model.new_cache()
            store = cache.store
            work = []
            for prompt, num_new in zip(prompts, news, strict=True):
                sequence, start = store.new_sequence(), len(prompt) - num_new
                if start:
                    run_pass(model, store, [NewTokens(sequence, prompt[:start], 0)])
                work.append(NewTokens(sequence, prompt[start:], start, num_new))
            passes = model.stats.weight_passes
            found = run_pass(model, store, work)
            passes = model.stats.weight_passes - passes
        assert passes == 1, f"{len(work)} rows: expected one weight pass, got {passes}"
        for row, (prompt, logits) in enumerate(zip(prompts, found, strict=True)):
            expected = subject.reference().run(prompt)[-len(logits) :]
            same_within(
                logits,
                expected,
                1e-4,
                f"logits of row {row}, {news[row]} new of {lengths[row]} tokens",
            )

    @check(
        "batches.shared-prefix",
        "Sequences that were forked from one text, and from one another, give in one pass what "
        "each gives alone, and what they share is read once for all of them.",
        look="core folds their queries into one: caches(), and which attention the family declares",
        needs=["batch"],
    )
    @pytest.mark.parametrize("kv", ["device", "disk"])
    def test_shared_prefix(self, subject: Subject, kv: str) -> None:
        blocks = supports(subject.adapter, "blockwise-attention")
        document, own = subject.prompt(530), [subject.prompt(n, seed=n) for n in (300, 9, 40, 3)]
        steps = [subject.prompt(n, seed=n) for n in (1, 1, 1, 5, 1)]
        with subject.open(kv=kv, attention="blockwise" if blocks else "exact") as model:
            cache = model.new_cache()
            store = cache.store
            rows, texts = [store.new_sequence()], [document]
            run_pass(model, store, [NewTokens(rows[0], document, 0)])
            forks = [(store.fork(rows[0]), document) for _ in own]
            work = [
                NewTokens(row, new, len(text), len(new))
                for (row, text), new in zip(forks, own, strict=True)
            ]
            found = run_pass(model, store, work)
            for (row, text), new, logits in zip(forks, own, found, strict=True):
                rows.append(row)
                texts.append(torch.cat([text, new]))
                _same_as_alone(subject, texts[-1], logits, f"{len(new)} tokens after a fork at 530")
            rows.append(store.fork(rows[1]))  # after the longest: they share what it has of its own
            texts.append(texts[1])
            order = [1, 0, 3, 2, 5]
            work = [
                NewTokens(rows[i], new, len(texts[i]), len(new))
                for i, new in zip(order, steps, strict=True)
            ]
            before = store.bytes_read
            found = run_pass(model, store, work)
            num_read = store.bytes_read - before
            for i, new, logits in zip(order, steps, found, strict=True):
                what = f"{len(new)} tokens of one of {len(order)} forks, after {len(texts[i])}"
                _same_as_alone(subject, torch.cat([texts[i], new]), logits, what)
            kinds = {kind.kind for kind in subject.adapter.caches(subject.config)}
            # A model's own forward reads the blocks of each row by itself.
            blocks &= not subject.adapter.layout(subject.config).own_forward
            if kv == "disk" and blocks and kinds <= {"full", "recurrent"}:
                for item in work:
                    store.truncate(item.sequence, item.start)
                before = store.bytes_read
                run_pass(model, store, work[:1])
                alone = store.bytes_read - before
                assert num_read < 2.5 * alone, (
                    f"{len(order)} forks of one text of 530 tokens: expected less than 2.5 times "
                    f"the KV bytes of one of them to be read, got {num_read / alone:.1f} times"
                )

    @check(
        "batches.left-padded",
        "A left-padded batch generates the tokens of each prompt alone.",
        look=_LOOK,
        needs=["batch"],
    )
    def test_left_padded(self, subject: Subject) -> None:
        prompts = [subject.prompt(n, seed=i) for i, n in enumerate((300, 20, 111))]
        ids, mask = left_padded(prompts)
        with subject.open() as model:
            found = generate(model, ids, 12, attention_mask=mask)
            others = [prompts[0], prompts[2][:70], prompts[0][:150]]
            more_ids, more_mask = left_padded(others)
            more = generate(model, more_ids, 4, attention_mask=more_mask)
        for batch, rows, width, num_new in (
            (found, prompts, ids.shape[1], 12),
            (more, others, more_ids.shape[1], 4),
        ):
            for row, prompt in enumerate(rows):
                expected = subject.reference().greedy(prompt, num_new)[0]
                what = f"tokens of row {row} of {[len(one) for one in rows]}"
                same_tokens(batch[row, width:].tolist(), expected, what)

    @check(
        "batches.right-padded",
        "A batch that is padded on the right has the logits of each prompt alone, and goes on from "
        "them.",
        look=_LOOK,
        needs=["batch"],
    )
    def test_right_padded(self, subject: Subject) -> None:
        prompts = [subject.prompt(n, seed=i) for i, n in enumerate((120, 33))]
        ids, mask = torch.zeros(2, 120, dtype=torch.long), torch.zeros(2, 120, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)], mask[row, : len(prompt)] = prompt, 1
        with subject.open() as model:
            cache = model.new_cache()
            found = model(input_ids=ids, attention_mask=mask, past_key_values=cache).logits
            mask = functional.pad(mask, (0, 1), value=1)
            step = model(input_ids=ids[:, :1], attention_mask=mask, past_key_values=cache).logits
        for row, prompt in enumerate(prompts):
            expected = subject.reference().run(torch.cat([prompt, prompt[:1]]))
            what = f"logits of row {row}, {len(prompt)} of 120 columns"
            same_within(found[row, : len(prompt)], expected[:-1], 1e-4, what)
            same_within(step[row], expected[-1:], 1e-4, f"{what}, and a step")

    @check(
        "batches.padded-ends",
        "A text that should go on from padding is refused, in `generate` and in a pass that asks "
        "for the last logits alone, and the cache stays as it was.",
        look="core refuses it; code of the adapter that changes masks",
        needs=["batch"],
    )
    def test_padded_ends(self, subject: Subject) -> None:
        ids = torch.stack([subject.prompt(12, seed=s) for s in (1, 2, 3)])
        mask = torch.ones_like(ids)
        mask[1, 9:] = 0
        what = "3 rows of 12 columns, of which row 1 ends in 3 of padding"
        with subject.open() as model:
            cache = model.new_cache()
            with refused(InputError, f"`generate` after {what}"):
                generate(model, ids, 2, attention_mask=mask, past_key_values=cache)
            with refused(InputError, f"the last logits of {what}"):
                model(input_ids=ids, attention_mask=mask, past_key_values=cache, logits_to_keep=1)
            length = cache.get_seq_length()
            assert length == 0, f"{what}, refused: expected an empty cache, got {length} positions"

    @check(
        "batches.crop",
        "Cutting columns off a left-padded batch cuts each row where those columns were in it, its "
        "padding counted; going on then gives the bits of a batch that never had them, and a "
        "`generate` that is replayed its tokens.",
        look="caches(): what a layer remembers must be cut back to any earlier token",
        needs=["batch", "truncate"],
    )
    @pytest.mark.parametrize("kv", ["device", "disk"])
    def test_crop(self, subject: Subject, kv: str) -> None:
        ids, mask = left_padded([subject.prompt(n, seed=n) for n in (60, 9, 33)])
        longer = torch.cat([ids, torch.stack([subject.prompt(12, seed=s) for s in (1, 2, 3)])], 1)
        parts = ids, longer[:, 60:62], longer[:, 62:66]
        others = torch.stack([subject.prompt(4, seed=s) for s in (4, 5, 6)])
        with subject.open(kv=kv) as model:
            expected = _continued(model, model.new_cache(), mask, [*parts[:2], others])
            cache = model.new_cache()
            _continued(model, cache, mask, parts)
            cache.crop(-4)
            same_columns(cache, mask, 62, "after 4 of 66 columns were cut")
            found = _continued(model, cache, mask, [others])
            same_bits(found, expected, "logits of a padded batch after 4 columns were cut")
            if not any(kind.states for kind in subject.adapter.caches(subject.config)):
                cache.crop(-31)  # two rows end in their padding
                same_columns(cache, mask, 35, "after 31 of 66 columns were cut")
                logits = _continued(model, cache, mask[:, :35], [others])
                for row in range(len(ids)):
                    left = ids[row, :35][mask[row, :35] == 1]
                    wanted = subject.reference().run(torch.cat([left, others[row]]))[-4:]
                    same_within(logits[row], wanted, 1e-4, f"row {row} cut to 35 columns")
            cache.crop(-cache.get_seq_length() - 5)
            same_columns(cache, mask, 0, "after more columns were cut than there are")
            first = generate(model, ids, 5, attention_mask=mask, past_key_values=cache)
            cache.crop(-cache.get_seq_length())
            again = generate(model, ids, 5, attention_mask=mask, past_key_values=cache)
        for row, (one, other) in enumerate(zip(first, again, strict=True)):
            same_tokens(other.tolist(), one.tolist(), f"row {row} of a replayed `generate`")


class Drafts(AdapterSuite):
    """Checking k tokens in one pass equals k steps."""

    @check(
        "drafts.verify",
        "A draft of k tokens gives the logits of k steps, wherever it turns wrong, and leaves no "
        "trace of what was rejected.",
        look="caches(): what a layer remembers must be cut back to any earlier token",
        needs=["drafts", "truncate"],
    )
    @pytest.mark.parametrize("kv", ["device", "disk"])
    def test_verify(self, subject: Subject, kv: str) -> None:
        prompt, num_drafted = subject.prompt(253), 4
        tokens, logits = subject.reference().greedy(prompt, 10)
        with subject.open(kv=kv) as model:
            for num_right in range(num_drafted + 1):
                cache = model.new_cache()
                model(input_ids=prompt[None], past_key_values=cache, logits_to_keep=1)
                cache.activate_past_recording()
                wrong = [(token + 1) % subject.vocab_size for token in tokens]
                draft = [tokens[0], *tokens[1 : num_right + 1], *wrong[num_right + 1 :]]
                draft = draft[: num_drafted + 1]
                found = model(input_ids=torch.tensor([draft]), past_key_values=cache).logits[0]
                what = f"{num_right} of {num_drafted} right, KV on {kv}"
                same_within(
                    found[: num_right + 1], logits[1 : num_right + 2], 1e-4, f"logits, {what}"
                )
                cache.crop(-(num_drafted - num_right) or cache.get_seq_length())
                following = torch.tensor([[tokens[num_right + 1]]])
                after = model(input_ids=following, past_key_values=cache).logits[0]
                same_within(
                    after, logits[num_right + 2 : num_right + 3], 1e-4, f"the step after, {what}"
                )
                cache.close()

    @check(
        "drafts.assisted",
        "Prompt lookup gives the tokens of plain greedy decoding, in no more weight passes.",
        look="caches(): what a layer remembers must be cut back to any earlier token",
        needs=["drafts", "truncate"],
    )
    def test_assisted(self, subject: Subject) -> None:
        piece = subject.prompt(30)
        prompt = torch.cat([piece, piece, piece])
        expected = subject.reference().greedy(prompt, 24)[0]
        with subject.open() as model:
            plain = greedy(model, prompt, 24)[0]
            passes = model.stats.weight_passes
            found = generate(model, prompt[None], 24, prompt_lookup_num_tokens=4)
            assisted = model.stats.weight_passes - passes
        same_tokens(plain, expected, "tokens without a draft")
        same_tokens(found[0, len(prompt) :].tolist(), expected, "tokens with prompt lookup")
        assert assisted <= 24, f"expected at most 24 weight passes for 24 tokens, got {assisted}"


def _same_as_alone(subject: Subject, text: Tensor, logits: Tensor, what: str) -> None:
    """Raises AssertionError unless `logits` are the last ones of a text [S] run alone."""
    expected = subject.reference().run(text)[-len(logits) :]
    same_within(logits, expected, 1e-4, f"logits of {what}")


def _continued(
    model: StreamedModel, cache: SequenceCache, mask: Tensor, parts: Sequence[Tensor]
) -> Tensor:
    """Logits [B, t, V] of the last of `parts` [B, t], which go on in `cache` one after the other;
    `mask` [B, S] is that of its beginning.
    """
    for ids in parts:
        length = cache.get_seq_length() + ids.shape[1]
        grown = functional.pad(mask, (0, max(length - mask.shape[1], 0)), value=1)[:, :length]
        logits: Tensor = model(input_ids=ids, attention_mask=grown, past_key_values=cache).logits
    return logits
