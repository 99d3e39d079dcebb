"""Answers that follow a JSON schema: tokens that would leave it are never chosen. By llguidance,
which is the extra `structured`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ollm_core.errors import InputError, OllmError, UnsupportedError

_KEPT = 256
"""States of one request's answers: each goes on from its last."""
_OPTIONS = {"whitespace_pattern": r"[ \n]{1,8}"}
"""Between the parts of JSON. Without a limit small models write white space for ever."""


class Grammars:
    """Makes logits processors for one model. Not thread-safe."""

    def __init__(self, tokenizer: Any, vocab_size: int, end_ids: Sequence[int]) -> None:
        self._tokenizer, self._vocab_size, self._end_ids = tokenizer, vocab_size, list(end_ids)
        self._known: Any = None

    def follow(self, schema: Mapping[str, Any], num_prompt_tokens: int) -> FollowsSchema:
        """A processor for answers to one prompt of so many tokens. Raises InputError for a schema
        that is none, or is too large; UnsupportedError without the extra or for a tokenizer that
        cannot be followed.
        """
        library = _library()
        if self._known is None:
            self._known = self._open(library)
        limits = library.LLParserLimits(verbose_errors=False)
        try:
            grammar = library.LLMatcher.grammar_from_json_schema(dict(schema), defaults=_OPTIONS)
            fault = library.LLMatcher.validate_grammar(grammar, self._known, limits=limits)
        except ValueError as error:
            fault = str(error)
        if fault and not fault.startswith("WARNING"):
            raise InputError(f"the schema: {' '.join(fault.split())[:300]}")
        root = library.LLMatcher(self._known, grammar, limits=limits, log_level=0)
        if root.is_error():
            raise InputError(f"the schema: {' '.join(root.get_error().split())[:300]}")
        return FollowsSchema(root, num_prompt_tokens)

    def _open(self, library: Any) -> Any:
        if not self._end_ids:
            raise UnsupportedError("a schema: need a model with an end of text, have none")
        from llguidance.hf import from_tokenizer

        try:
            return from_tokenizer(
                self._tokenizer, n_vocab=self._vocab_size, eos_token=self._end_ids
            )
        except Exception as error:
            raise UnsupportedError(
                f"a schema: the model's tokenizer cannot be followed: {type(error).__name__}"
            ) from error


class FollowsSchema:
    """A logits processor: token ids [1, S] and logits [1, V] -> logits [1, V], -inf for tokens that
    would leave the schema. May be called for several answers to its prompt, in any order.
    """

    def __init__(self, root: Any, num_prompt_tokens: int) -> None:
        """`root` is a matcher that has met no token."""
        self._num_prompt_tokens = num_prompt_tokens
        self._states: OrderedDict[tuple[int, ...], Any] = OrderedDict([((), root)])
        self._root = root

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Raises OllmError where the schema is too complex to go on with."""
        token_ids = tuple(input_ids[0, self._num_prompt_tokens :].tolist())
        matcher = self._state(token_ids)
        packed = torch.frombuffer(bytearray(matcher.compute_bitmask()), dtype=torch.uint8)
        if matcher.is_error():
            raise OllmError(f"the schema: {' '.join(matcher.get_error().split())[:300]}")
        bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1  # [V / 8, 8]
        allowed = bits.flatten()[: scores.shape[1]].bool().to(scores.device)
        return scores.masked_fill(~allowed, -torch.inf)

    def _state(self, token_ids: tuple[int, ...]) -> Any:
        """The matcher after these tokens."""
        found = self._states.get(token_ids)
        if found is None:
            before = self._states.get(token_ids[:-1])
            new = token_ids[-1:] if before is not None else token_ids
            found = (self._root if before is None else before).deep_copy()
            for token_id in new:
                found.consume_token(token_id)
            self._states[token_ids] = found
            while len(self._states) > _KEPT:
                self._states.popitem(last=False)
        self._states.move_to_end(token_ids)
        return found


def _library() -> Any:
    try:
        import llguidance
    except ModuleNotFoundError as error:
        raise UnsupportedError(
            "a schema: need the package llguidance, have none",
            hint="pip install 'ollm-core[structured]'",
        ) from error
    return llguidance
