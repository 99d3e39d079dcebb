"""Texts that a draft source is tried with, and what it drafts after them."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ollm_conformance.seeds import drawn
from ollm_core import Drafter, DraftRequest, FollowsText, MemoryAccount
from ollm_core.testing import Closing


def random_text(num_tokens: int, vocab_size: int, seed: int) -> Tensor:
    """Token ids [S]."""
    generator = drawn(seed)
    return torch.randint(0, vocab_size, (num_tokens,), generator=generator)


def texts(vocab_size: int) -> dict[str, Tensor]:
    """Texts by what they are: what repeats, counts or ends at the edges of the vocabulary is what
    draft sources look for.
    """
    phrase = random_text(9, vocab_size, 1)
    steps = torch.arange(30)
    return {
        "random tokens": random_text(50, vocab_size, 2),
        "a phrase that comes back": torch.cat([phrase, random_text(20, vocab_size, 3), phrase[:5]]),
        "one token again and again": torch.full((40,), vocab_size - 1),
        "counting up to the last token": steps + vocab_size - 30,
        "counting down to token 0": steps.flip(0),
        "two tokens in turn": torch.tensor([3, vocab_size - 2] * 12),
    }


def answer(drafter: Drafter, token_ids: Tensor, num_tokens: int, what: str) -> list[int]:
    """The draft for a text, as plain numbers. Raises AssertionError for anything but token ids."""
    try:
        found = drafter(token_ids, num_tokens)
    except Exception as error:
        raise AssertionError(f"{what}: expected a draft, got {error!r}") from error
    if isinstance(found, Tensor):
        plain = found.ndim == 1 and not found.is_floating_point() and found.dtype != torch.bool
        assert plain, f"{what}: expected integers [n], got {found.dtype} {list(found.shape)}"
        return [int(token) for token in found]
    return [_token(one, what) for one in found]


def _token(one: object, what: str) -> int:
    """A token id as a plain number. Raises AssertionError for what is none."""
    try:
        if not isinstance(one, bool):
            return operator.index(one)  # type: ignore[arg-type]
    except TypeError:
        pass
    raise AssertionError(f"{what}: expected token ids, got {one!r:.60}")


@dataclass(frozen=True, slots=True)
class OpenDrafter:
    """A draft source under test."""

    drafter: Drafter
    request: DraftRequest

    @property
    def used(self) -> int:
        """Bytes that it has reserved."""
        return self.request.device_account.used + self.request.host_account.used

    @property
    def accounts(self) -> tuple[MemoryAccount, MemoryAccount]:
        """Of the device and of the host."""
        return self.request.device_account, self.request.host_account

    def begin(self, num_tokens: int) -> None:
        """Tell it of a text to come, if it follows texts."""
        if isinstance(self.drafter, FollowsText):
            self.drafter.begin(num_tokens)

    def catch_up(self, token_ids: Tensor) -> None:
        """Let it read a text, if it follows texts."""
        if isinstance(self.drafter, FollowsText):
            self.drafter.catch_up(token_ids)

    def close(self) -> None:
        """Close it, if it can be closed."""
        if isinstance(self.drafter, Closing):
            self.drafter.close()

    def draft(self, token_ids: Tensor, num_tokens: int, what: str) -> list[int]:
        """The draft for a text, after catching up with it."""
        self.catch_up(token_ids)
        return answer(self.drafter, token_ids, num_tokens, what)


@contextmanager
def closing(opened: OpenDrafter) -> Iterator[OpenDrafter]:
    """Close it after the block."""
    try:
        yield opened
    finally:
        opened.close()
