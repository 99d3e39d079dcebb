"""Keys and values that some layers hand to later ones, which have none of their own, by way of a
mapping that the model's forward gives to all of them.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ollm_core.device.offload import ActivationOffload
from ollm_core.errors import UnsupportedError
from ollm_core.model.own_forward import LayerArguments, SharedPair


@dataclass(frozen=True, slots=True)
class _Kept:
    """One pair of a chunk: the length that later layers get, and of that what only this chunk has;
    the rest is what the chunks before it have. [R, G, T, D] each.
    """

    num_tokens: int
    parts: tuple[Tensor, ...]


class SharedKeys:
    """Those of one chunk. Between the calls of its layers they wait where `offload` has them, the
    tokens of earlier chunks only once.
    """

    def __init__(self, offload: ActivationOffload, before: SharedKeys | None) -> None:
        """`before` has those of the chunk before, of the same rows; None: this is their first."""
        self._offload = offload
        self._before = before
        self._kept: dict[tuple[str, Hashable], _Kept] = {}

    def fill(self, arguments: LayerArguments) -> None:
        """Give a layer what those before it have handed on."""
        mappings = arguments.mappings
        for (place, key), kept in self._kept.items():
            pair = (self._whole(place, key, kept, number) for number in range(len(kept.parts)))
            mappings[place][key] = tuple(pair)

    def keep(self, arguments: LayerArguments, num_new: int) -> None:
        """Take what the layer has handed on, after a call with `num_new` tokens."""
        for place, mapping in arguments.mappings.items():
            for key, pair in mapping.items():
                if (place, key) not in self._kept:
                    length = pair[0].shape[2]
                    own = length if self._before is None else num_new
                    parts = tuple(self._stored(one.narrow(2, length - own, own)) for one in pair)
                    self._kept[place, key] = _Kept(length, parts)

    def _stored(self, part: Tensor) -> Tensor:
        return self._offload.store(part) if self._offload.on_host else part.clone()

    def _whole(self, place: str, key: Hashable, kept: _Kept, number: int) -> Tensor:
        """One tensor as the layer has handed it on, in memory of its own."""
        like = kept.parts[number]
        shape = *like.shape[:2], kept.num_tokens, like.shape[3]
        whole = torch.empty(shape, dtype=like.dtype, device=self._offload.device)
        end = kept.num_tokens
        for part in self._parts(place, key, number):
            count = min(part.shape[2], end)
            whole.narrow(2, end - count, count).copy_(part.narrow(2, part.shape[2] - count, count))
            end -= count
            if not end:
                break
        return whole

    def _parts(self, place: str, key: Hashable, number: int) -> Iterator[Tensor]:
        """From the end."""
        chunk: SharedKeys | None = self
        while chunk is not None:
            yield chunk._kept[place, key].parts[number]
            chunk = chunk._before


def pretend_shared(
    pairs: Sequence[SharedPair], arguments: LayerArguments, lengths: Sequence[int], like: Tensor
) -> None:
    """Let a layer find `pairs` [R, G, T, D], of as many tokens as `lengths` says, that nobody has
    handed on, in the dtype of `like` [R, 0].
    """
    for pair, length in zip(pairs, lengths, strict=True):
        shapes = [(like.shape[0], heads, length, size) for heads, size in pair.sizes]
        made = tuple(like.new_empty(shape) for shape in shapes)
        arguments.mappings[pair.place][pair.key] = made


def check_shared(
    arguments: LayerArguments, before: Sequence[object], answer: tuple[Tensor, Tensor] | None
) -> None:
    """Raises UnsupportedError for a layer that has put something else into a mapping, of which
    `before` are the values, than the pair that its cache has given as `answer`.
    """
    for mapping in arguments.mappings.values():
        for pair in mapping.values():
            if any(pair is one for one in before):
                continue
            if list(map(id, pair)) != list(map(id, answer or ())):
                raise UnsupportedError(
                    "a layer hands something else to later ones than its keys and values",
                    hint="a model is run layer by layer; this one is not made so",
                )
