"""Computes transformers' own loss from `labels`, in memory that is accounted."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig

from ollm_core.errors import InputError, UnsupportedError
from ollm_core.generate.opened import OpenedModel
from ollm_core.generate.padding import PaddedBatch
from ollm_core.memory.kinds import MemoryKind
from ollm_core.memory.pair import PerMemory

IGNORED = -100
"""The label of a position that does not count, as in torch."""


@contextmanager
def room_for_loss(
    model: OpenedModel,
    loss_function: Callable[..., Tensor],
    batch: PaddedBatch,
    labels: Tensor,
    shift_labels: Tensor | None,
    num_items_in_batch: int | Tensor | None,
) -> Iterator[Callable[[Tensor], Tensor]]:
    """Check labels, and hold the memory that their loss takes. What is given tells it of logits
    [B, T, V], by the model's own `loss_function`.
    """
    config = model.config
    own = compares_own_positions(config)
    check_labels(labels, labels if own else shift_labels, batch, config.vocab_size)

    def loss_of(logits: Tensor) -> Tensor:
        size = config.vocab_size
        if own:
            return functional.cross_entropy(logits.view(-1, size), labels.view(-1))
        others = {"shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
        return loss_function(logits=logits, labels=labels, vocab_size=size, **others)

    if getattr(config, "output_router_logits", False):
        raise UnsupportedError(
            "labels: this model's loss counts how its routers choose, too",
            hint="set model.config.output_router_logits = False for the loss of the text alone",
        )
    needed = loss_bytes(batch, config.vocab_size, model.dtype)
    model.engine.set_aside(MemoryKind.LOSS, needed)
    try:
        with torch.no_grad():
            yield loss_of
    finally:
        model.accounts.device.release(MemoryKind.LOSS, needed.device)


def compares_own_positions(config: PreTrainedConfig) -> bool:
    """Whether transformers' class of a model compares labels with the logits of their own
    positions, whatever else it is told: decoders that were taken from encoder-decoders, which do
    not call its `loss_function`.
    """
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return False
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    forward = inspect.unwrap(kind.forward)
    called = forward.__code__.co_names
    return "CrossEntropyLoss" in called and "loss_function" not in called


def check_labels(
    labels: Tensor, shift_labels: Tensor | None, batch: PaddedBatch, vocab_size: int
) -> None:
    """Raise InputError unless there are logits for all that counts: `labels` [B, T] are compared
    with the logits one position earlier, `shift_labels` [B, T] with those of their own.
    """
    for name, given in (("labels", labels), ("shift_labels", shift_labels)):
        if given is not None and (given.shape != batch.ids.shape or given.is_floating_point()):
            raise InputError(
                f"{name}: need integers {list(batch.ids.shape)}, "
                f"have {str(given.dtype)[6:]} {list(given.shape)}",
                hint="one for each of the input_ids",
            )
    if batch.first or batch.chosen is not None:
        raise InputError("labels: need the logits of all tokens", hint="leave logits_to_keep out")
    wanted = labels if shift_labels is None else shift_labels
    wanted = wanted.to("cpu")
    if shift_labels is None:
        wanted = functional.pad(wanted, (0, 1), value=IGNORED)[:, 1:]
    counts = wanted != IGNORED
    foreign = wanted[counts & ((wanted < 0) | (wanted >= vocab_size))]
    if len(foreign):
        raise InputError(
            f"labels: {int(foreign[0])} is not in the vocabulary of {vocab_size}",
            hint=f"a label that does not count is {IGNORED}",
        )
    lost = (counts & ~batch.kept).nonzero()
    if len(lost):
        row, column = lost[0].tolist()
        raise InputError(
            f"labels: position {column} of row {row} is padding, and has no logits to compare",
            hint=f"give {IGNORED} for padding, and for the token after it",
        )


def loss_bytes(batch: PaddedBatch, vocab_size: int, dtype: torch.dtype) -> PerMemory[int]:
    """What the loss takes beside logits in `dtype`: them in float32, their logarithms, labels."""
    num_tokens = batch.ids.numel()
    num_copies = 1 if dtype == torch.float32 else 2
    num_bytes = num_copies * num_tokens * vocab_size * torch.float32.itemsize
    return PerMemory(num_bytes + 4 * num_tokens * torch.int64.itemsize, 0)
