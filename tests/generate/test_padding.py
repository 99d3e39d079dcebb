"""Padded batches, and the ragged rows that the engine takes."""

from __future__ import annotations

import pytest
import torch

from ollm_core import InputError
from ollm_core.generate.padding import padded_batch, refuse_padded_end

IDS = torch.tensor([[0, 0, 7, 8], [5, 6, 0, 0], [1, 0, 2, 3]])
MASK = torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0], [1, 0, 1, 1]])


def logits_of(batch):
    """For each row, logits [n, 1] that are its last token ids."""
    counts = batch.num_logits
    return [ids[-n:, None].float() for ids, n in zip(batch.tokens, counts, strict=True)]


@pytest.mark.parametrize("wanted", [0, torch.tensor([1, 3]), torch.tensor([3, 0]), MASK[0].bool()])
def test_real_tokens_go_out_and_their_logits_come_back(wanted):
    """Rows are without padding wherever that is, and what comes back stands where they stood."""
    batch = padded_batch(IDS, MASK, [], wanted)
    assert [row.tolist() for row in batch.tokens] == [[7, 8], [5, 6], [1, 2, 3]]
    columns = slice(None) if isinstance(wanted, int) else wanted
    expected = (IDS * MASK)[:, columns, None].float()
    assert torch.equal(batch.spread(logits_of(batch)), expected)


@pytest.mark.parametrize("num_last", [1, 3, 9, -1])
def test_a_number_of_columns_counts_from_the_end(num_last):
    """As in transformers, where a negative one leaves out the first."""
    batch = padded_batch(IDS, None, [], num_last)
    assert torch.equal(batch.spread(logits_of(batch))[..., 0], IDS[:, -num_last:].float())


def test_positions_count_real_tokens():
    """Those of a row follow its earlier ones."""
    past = [torch.tensor([False, True]), torch.tensor([True, True]), torch.tensor([False, True])]
    before = torch.stack(past).long()
    batch = padded_batch(IDS, torch.cat([before, MASK], dim=1), past)
    assert batch.starts == (1, 2, 1)
    assert batch.positions[MASK.bool()].tolist() == [1, 2, 2, 3, 1, 2, 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((IDS[0], None, []), r"input_ids: need integers \[rows, tokens\], have int64 \[4\]"),
        ((IDS.float(), None, []), r"have float32 \[3, 4\]"),
        ((IDS.tolist(), None, []), "have list"),
        ((IDS[:, :0], None, []), "the prompt is empty"),
        ((IDS[:0], None, []), "the prompt is empty"),
        ((IDS, MASK * 0, []), "the prompt is empty"),
        ((IDS, MASK[None], []), r"attention_mask: need \[3, 4\], have int64 \[1, 3, 4\]"),
        ((IDS, {"full_attention": MASK}, []), "have dict"),
        ((IDS, MASK, [torch.ones(2).bool()] * 3), r"need \[3, 6\], have int64 \[3, 4\]"),
        ((IDS, None, [torch.ones(2).bool()]), "the cache has 1 rows, the batch has 3"),
        ((IDS, None, [], torch.tensor([4])), r"logits_to_keep: need .*below 4, have int64 \[1\]"),
        ((IDS, None, [], torch.tensor([[1]])), r"columns \[n\] below 4, have int64 \[1, 1\]"),
        ((IDS, None, [], torch.tensor([], dtype=torch.long)), r"have int64 \[0\]"),
        ((IDS, None, [], -4), "have -4"),
        ((IDS, None, [], "all"), "have str"),
    ],
)
def test_what_is_no_batch_is_refused(arguments, message):
    """In one line, with what was needed and what was given."""
    with pytest.raises(InputError, match=message):
        padded_batch(*arguments)


def test_a_mask_agrees_with_the_cache():
    """What was padding before is padding still."""
    past = [torch.tensor([False, True, True])]
    with pytest.raises(InputError, match="its first 3 positions are other ones"):
        padded_batch(IDS[:1], torch.ones(1, 7), past)


def test_a_text_does_not_go_on_from_padding():
    """Where the logits of last positions are asked for, the last is a token."""
    with pytest.raises(InputError, match=r"row 1 of the batch ends in padding.*padding_side"):
        padded_batch(IDS, MASK, [], 1)
    with pytest.raises(InputError, match="row 1"):
        refuse_padded_end(MASK != 0)
    padded_batch(IDS[[0, 2]], MASK[[0, 2]], [], 1)
