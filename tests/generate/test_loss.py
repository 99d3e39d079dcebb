"""Labels give transformers' own loss, or a refusal."""

from __future__ import annotations

import pytest
import torch

import ollm
from ollm_core import DoesNotFitError, InputError, UnsupportedError
from ollm_core.generate.loss import loss_bytes
from ollm_core.generate.padding import padded_batch
from ollm_core.memory.tracker import AllocationTracker

RIGHT = torch.tensor([[1] * 20, [1] * 13 + [0] * 7])


def labels_of(ids, mask):
    """Only what follows a real token counts."""
    before = torch.cat([torch.zeros_like(mask[:, :1]), mask[:, :-1]], dim=1)
    return ids.masked_fill((mask * before) == 0, -100)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "mask", [RIGHT * 0 + 1, RIGHT, RIGHT.flip(1)], ids=["none", "right", "left"]
)
def test_the_loss_is_that_of_transformers(make_llama, reference, ids, dtype, mask):
    """Of whole rows and padded ones, as a mean, over a given number, and with shifted labels."""
    directory = make_llama(dtype)
    batch = ids(40).view(2, 20)
    labels = labels_of(batch, mask)
    shifted = torch.cat([labels[:, 1:], labels[:, :1] * 0 - 100], dim=1)
    theirs = reference(directory, dtype).model
    with ollm.load(directory, device="cpu") as model:
        for more in ({}, {"num_items_in_batch": 7}, {"shift_labels": shifted}):
            with torch.no_grad():
                expected = theirs(batch, attention_mask=mask, labels=labels, **more).loss
            found = model(batch, mask, labels=labels, **more)
            assert found.loss.dtype == torch.float32
            assert not found.loss.requires_grad
            tolerance = 1e-4 if dtype == torch.float32 else 3e-2
            assert torch.allclose(found.loss, expected, rtol=tolerance)
        assert model.accounts.device.kinds["loss"] == 0
    assert found.logits.shape == (2, 20, 199)


def test_labels_without_logits_are_refused(tiny, ids):
    """Before anything runs, with the position or the argument that is wrong."""
    batch = ids(40).view(2, 20)
    left = RIGHT.flip(1)
    with ollm.load(tiny, device="cpu") as model:
        for mask, row, column in ((RIGHT, 1, 13), (left, 1, 0)):
            message = f"labels: position {column} of row {row} is padding"
            with pytest.raises(InputError, match=message):
                model(batch, mask, labels=batch)
        for options, message in (
            ({"labels": batch[:, 1:]}, r"labels: need integers \[2, 20\], have int64 \[2, 19\]"),
            ({"labels": batch * 1.0}, r"have float32"),
            (
                {"labels": batch, "shift_labels": batch[:1]},
                r"shift_labels: .* have int64 \[1, 20\]",
            ),
            ({"labels": batch, "logits_to_keep": 3}, "need the logits of all tokens"),
            ({"labels": batch + 199}, "is not in the vocabulary of 199"),
            ({"shift_labels": batch}, "need labels"),
            ({"num_items_in_batch": 3}, "need labels"),
        ):
            with pytest.raises(InputError, match=message):
                model(batch, **options)
        model.config.output_router_logits = True
        with pytest.raises(UnsupportedError, match="routers"):
            model(batch, labels=batch)
        assert model.stats.weight_passes == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_memory_of_a_loss_is_accounted(make_llama, ids, dtype):
    """It takes what is set aside for it, and without room for that it is refused."""
    directory = make_llama(dtype, vocab_size=4096)
    batch = ids(512, 4096)[None]
    with ollm.load(directory, device="cpu") as model:
        logits = model(batch).logits
        needed = loss_bytes(padded_batch(batch, None, []), 4096, dtype).device
        with AllocationTracker("cpu") as tracker:
            model.loss_function(logits=logits, labels=batch, vocab_size=4096)
        assert 0.95 * needed <= tracker.peak <= needed
    with (
        ollm.load(directory, device="cpu", device_memory="8MB", kv="host") as model,
        pytest.raises(DoesNotFitError) as refused,
    ):
        model(batch)
    least = refused.value.needed_bytes
    with ollm.load(directory, device="cpu", device_memory=least, kv="host") as model:
        model(batch)
        with pytest.raises(DoesNotFitError):
            model(batch, labels=batch)
        assert not model.accounts.device.kinds.get("loss")
    with ollm.load(directory, device="cpu", device_memory=least + needed, kv="host") as model:
        model(batch, labels=batch)
