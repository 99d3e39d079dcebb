"""What a text that waits can begin with: what was read before, and what others will read, too."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from ollm_core.contracts.kv import KeepsPrefixes, KVStore
from ollm_core.errors import DamagedKVError, DoesNotFitError, KVStoreError
from ollm_core.kv.disk.borrowed import common
from ollm_core.serving.live import LiveText, RequestedText
from ollm_core.serving.prefixes import Prefixes

_LOOKS_AT = 256
"""Texts that are looked at for a common beginning."""


def shared_beginning(
    text: RequestedText, waiting: Iterable[RequestedText], has_already: int, worth: int
) -> tuple[int, list[RequestedText]]:
    """The beginning that `text` has in common with others that wait, whose separate reading would
    cost most: how many tokens, and the texts, itself among them. (0, []) if less than `worth`
    tokens would be saved; the first `has_already` are no saving.
    """
    alike: list[tuple[int, RequestedText]] = []
    for other in waiting:
        if other is not text and len(alike) < _LOOKS_AT:
            length = common(text.prompt, other.prompt)
            if length > has_already:
                alike.append((length, other))
    alike.sort(key=lambda pair: -pair[0])
    best, most = 0, 0
    for number, (length, _) in enumerate(alike, start=1):
        if (length - has_already) * number > most:
            best, most = length, (length - has_already) * number
    if most < max(worth, 1):
        return 0, []
    return best, [text, *(other for length, other in alike if length >= best)]


def best_known(text: LiveText, running: Sequence[LiveText], prefixes: Prefixes) -> int:
    """Of how many tokens of its prompt the scheduler has a sequence."""
    live = (_held(one, text.prompt) for one in running)
    return max((*live, prefixes.longest(text.prompt)), default=0)


def num_kept(token_ids: Tensor, store: KVStore, prefixes: Prefixes) -> int:
    """With how many of its tokens, int32 [T], a text would begin."""
    longest = prefixes.longest(token_ids)
    if isinstance(store, KeepsPrefixes):
        sequence, num_found = store.find(token_ids)
        store.release(sequence)
        longest = max(longest, num_found)
    return longest


def begin(
    text: LiveText, store: KVStore, running: Sequence[LiveText], prefixes: Prefixes
) -> tuple[int, int, int]:
    """A sequence for `text` that has as much of its prompt as can be found: the sequence, its
    tokens, and how many of them were found in the store's own prefix cache.
    """
    if isinstance(store, KeepsPrefixes):
        sequence, num_found = store.find(text.prompt)
    else:
        sequence, num_found = store.new_sequence(), 0
    better = prefixes.fork(text.prompt, longer_than=num_found)
    least = better[1] if better else num_found
    for one in sorted(running, key=lambda one: -_held(one, text.prompt)):
        held = _held(one, text.prompt)
        if held <= least:
            break
        assert one.sequence is not None
        try:
            live = store.fork(one.sequence, held), held
        except (KVStoreError, DamagedKVError, DoesNotFitError):
            continue
        if better:
            store.release(better[0])
        better = live
        break
    if better is None:
        return sequence, num_found, num_found
    store.release(sequence)
    return *better, num_found


def _held(one: LiveText, prompt: Tensor) -> int:
    """How much of `prompt` the sequence of a text has."""
    if one.sequence is None:
        return 0
    return min(common(one.prompt, prompt), one.num_stored)
