"""Converts between transformers' padded batches and the engine's lists of real tokens."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from ollm_core.errors import InputError


@dataclass(frozen=True, slots=True, eq=False)
class PaddedBatch:
    """Rows of new tokens, some of which are padding, and the columns whose logits are wanted."""

    ids: Tensor
    """[B, T] int64, in host memory."""
    kept: Tensor
    """[B, T] bool: which are real tokens."""
    starts: tuple[int, ...]
    """Real tokens that each row has already."""
    num_past: int
    """Positions of the padded batch before the new ones."""
    first: int
    """The first column whose logits are wanted."""
    chosen: Tensor | None
    """[n] int64: which from there on, in any order; None: all."""

    @property
    def tokens(self) -> list[Tensor]:
        """The real ones of each row, [n]."""
        return [ids[kept] for ids, kept in zip(self.ids, self.kept, strict=True)]

    @property
    def num_logits(self) -> list[int]:
        """Last real tokens of each row whose logits are to be computed, at least one."""
        return [max(int(kept.sum()), 1) for kept in self.kept[:, self.first :]]

    @property
    def positions(self) -> Tensor:
        """[B, T] int64: of each real token in its row. Elsewhere it means nothing."""
        return torch.tensor(self.starts, device="cpu")[:, None] + self.kept.cumsum(dim=1) - 1

    def spread(self, rows: Sequence[Tensor]) -> Tensor:
        """Logits of each row, [its `num_logits`, V], as [B, n, V]: zeros at padding."""
        kept = self.kept[:, self.first :]
        if bool(kept.all()):
            logits = rows[0][None] if len(rows) == 1 else torch.stack(list(rows))
        else:
            logits = rows[0].new_zeros(*kept.shape, rows[0].shape[-1])
            for row, values in enumerate(rows):
                logits[row, kept[row].to(values.device)] = values[: int(kept[row].sum())]
        return logits if self.chosen is None else logits[:, self.chosen.to(logits.device)]


def padded_batch(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    past: Sequence[Tensor],
    logits_to_keep: int | Tensor = 0,
) -> PaddedBatch:
    """`input_ids` [B, T] after rows that have `past`, bool [S] each: which positions are real; none
    where there are no rows yet. `attention_mask` is [B, S + T]. Raises InputError.
    """
    if not isinstance(input_ids, Tensor) or input_ids.ndim != 2 or not _integers(input_ids):
        raise InputError(
            f"input_ids: need integers [rows, tokens], have {_told(input_ids)}",
            hint="tokenize with return_tensors='pt'",
        )
    num_rows, num_new = input_ids.shape
    if past and len(past) != num_rows:
        raise InputError(f"the cache has {len(past)} rows, the batch has {num_rows}")
    num_past = len(past[0]) if past else 0
    ids = input_ids.to("cpu", torch.long)
    kept = torch.ones_like(ids, dtype=torch.bool)
    if attention_mask is not None:
        shape = (num_rows, num_past + num_new)
        if not isinstance(attention_mask, Tensor) or attention_mask.shape != shape:
            raise InputError(
                f"attention_mask: need {list(shape)}, have {_told(attention_mask)}",
                hint="one number for each position from the first on, 0 where it is padding",
            )
        mask = attention_mask.to("cpu", torch.bool)
        if any(not torch.equal(row[:num_past], had) for row, had in zip(mask, past, strict=False)):
            raise InputError(
                f"attention_mask: its first {num_past} positions are other ones than those that "
                "the cache was filled with",
                hint="give the mask from before, with more at its end",
            )
        kept = mask[:, num_past:].clone()
    if not bool(kept.any(dim=1).all()) or not num_rows:
        raise InputError("the prompt is empty", hint="give at least one token per row")
    if isinstance(logits_to_keep, int) and logits_to_keep > 0:
        refuse_padded_end(kept)
    starts = tuple(int(row.sum()) for row in past) or (0,) * num_rows
    return PaddedBatch(ids, kept, starts, num_past, *_columns(logits_to_keep, num_new))


def refuse_padded_end(kept: Tensor) -> None:
    """Raise InputError if a row of `kept`, bool [B, S], ends in padding: where a text ends, its
    next token is chosen, and padding has no logits.
    """
    ending = (~kept[:, -1]).nonzero().flatten().tolist()
    if ending:
        raise InputError(
            f"row {ending[0]} of the batch ends in padding, and a text goes on from its last token",
            hint="pad on the left: tokenizer.padding_side = 'left'",
        )


def _columns(logits_to_keep: int | Tensor, num_new: int) -> tuple[int, Tensor | None]:
    """As transformers takes it, a number of last columns, 0 for all, or columns -> `first` and
    `chosen` of a PaddedBatch.
    """
    chosen = torch.empty(0, dtype=torch.long, device="cpu")
    if isinstance(logits_to_keep, int):
        first = slice(-logits_to_keep, None).indices(num_new)[0]
        if first < num_new:
            return first, None
    elif isinstance(logits_to_keep, Tensor):
        with suppress(IndexError):
            chosen = torch.arange(num_new, device="cpu")[logits_to_keep.to("cpu")]
    if chosen.ndim != 1 or not len(chosen):
        raise InputError(
            f"logits_to_keep: need a number, or columns [n] below {num_new}, "
            f"have {_told(logits_to_keep)}"
        )
    first = int(chosen.min())
    return first, chosen - first


def _integers(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def _told(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return str(value) if isinstance(value, int) else type(value).__name__
