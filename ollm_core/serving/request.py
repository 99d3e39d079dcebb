"""What is asked of a model, and the events that answer it. Loads no torch."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from ollm_core.errors import InputError
from ollm_core.values import count

if TYPE_CHECKING:
    from torch import Tensor

MAX_STOPS = 64
MAX_SEED = (1 << 63) - 1
_ids = itertools.count()

FinishReason = Literal["stop", "length", "cancelled"]
LogitsProcessor = Callable[["Tensor", "Tensor"], "Tensor"]
"""transformers' form: token ids [1, S] and logits [1, V] in float32 -> logits [1, V]."""
Chooser = Callable[[Sequence[int], "Tensor"], int]
"""A sampling function of the user's: token ids so far and logits [V] in float32 -> token id."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How an answer is made, in the words of vLLM's class of this name. Raises InputError for a
    value out of its range.
    """

    n: int = 1
    """Answers to one prompt."""
    temperature: float = 1.0
    """0 is greedy: always the most likely token."""
    top_k: int = 0
    """Sample among so many of the most likely tokens; 0 or -1: all."""
    top_p: float = 1.0
    """Sample among the most likely tokens that sum up to this probability."""
    min_p: float = 0.0
    """Leave out tokens less likely than this share of the most likely one."""
    repetition_penalty: float = 1.0
    """Above 1: tokens that the text has already are less likely (Keskar et al. 2019)."""
    max_tokens: int = 256
    """Most new tokens."""
    min_tokens: int = 0
    """New tokens before which the text does not end: neither the model's end nor `stop_token_ids`
    are chosen.
    """
    stop: str | Sequence[str] = ()
    """Texts that end the answer, and are not part of it."""
    stop_token_ids: Sequence[int] = ()
    """Token ids that do, beside those of the model."""
    ignore_eos: bool = False
    """Go on after the model's own end."""
    include_stop_str_in_output: bool = False
    shown_token_ids: Sequence[int] = ()
    """Special tokens that the text has; it is without the others."""
    seed: int | None = None
    """Repeats a text, whatever runs beside it. None: another one each time."""
    logprobs: int | None = None
    """How many of the most likely tokens to tell with each new one, by their log-probability
    before anything of the above changed it; 0: that of the new token alone.
    """
    prompt_logprobs: int | None = None
    """How many of the most likely tokens to tell in each place of the prompt, with how likely its
    own token is there: a Scored event before the first new token. Nothing of the prompt is then
    taken from the prefix cache.
    """
    logits_processors: Sequence[LogitsProcessor] = ()
    """Called in this order before the above, as transformers calls its own."""
    choose: Chooser | None = field(default=None, repr=False)
    """Your own sampling function in place of temperature, top_k, top_p and min_p."""

    def __post_init__(self) -> None:
        texts = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", texts)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        object.__setattr__(self, "shown_token_ids", tuple(self.shown_token_ids))
        object.__setattr__(self, "logits_processors", tuple(self.logits_processors))
        for name, least in (("n", 1), ("max_tokens", 1), ("min_tokens", 0)):
            count(name, getattr(self, name), least)
        if self.top_k != -1:
            count("top_k", self.top_k, 0)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                count(name, getattr(self, name), 0)
        _in_range("temperature", self.temperature, 0, math.inf)
        _in_range("top_p", self.top_p, 0, 1, least_is_out=True)
        _in_range("min_p", self.min_p, 0, 1)
        _in_range("repetition_penalty", self.repetition_penalty, 0, math.inf, least_is_out=True)
        if self.seed is not None:
            count("seed", self.seed, -MAX_SEED)
            if self.seed > MAX_SEED:
                raise InputError(f"seed is {self.seed}, expected at most {MAX_SEED}")
        if len(texts) > MAX_STOPS:
            raise InputError(f"stop: need at most {MAX_STOPS} texts, have {len(texts)}")
        if not all(isinstance(text, str) and text for text in texts):
            raise InputError("stop: need text, have an empty one or something else")
        if self.min_tokens > self.max_tokens:
            raise InputError(
                f"min_tokens is {self.min_tokens}, expected at most max_tokens, {self.max_tokens}"
            )

    def showing(self, token_ids: Iterable[int]) -> SamplingParams:
        """These, with so many more special tokens in the text."""
        return replace(self, shown_token_ids=(*self.shown_token_ids, *token_ids))

    @property
    def stops(self) -> tuple[str, ...]:
        """`stop` as a tuple."""
        return tuple(self.stop)


@dataclass(frozen=True, slots=True)
class Score:
    """Wanted in place of an answer: the log-probability of each of the prompt's last tokens."""

    num_tokens: int
    top: int = 0
    """How many of the most likely tokens to tell in each of their places."""


@dataclass(frozen=True, slots=True)
class Choices:
    """Wanted in place of an answer: how likely each of these token ids is to come next."""

    token_ids: tuple[int, ...]


Wanted = SamplingParams | Score | Choices


@dataclass(frozen=True, kw_only=True)
class Request:
    """One thing that is asked of the model."""

    token_ids: Sequence[int]
    """The prompt."""
    wanted: Wanted
    priority: int = 0
    """Lower ones come first, and may take the place of higher ones."""
    keep: bool = True
    """Whether the prompt and its answer are saved in the prefix cache, where there is one."""
    request_id: str = field(default_factory=lambda: f"request-{next(_ids)}")


@dataclass(frozen=True, slots=True)
class Counts:
    """What a request took."""

    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    """Of those, found in a prefix that was read before."""
    num_new_tokens: int = 0
    queued_seconds: float = 0.0
    prefill_seconds: float = 0.0
    """From the beginning of its first pass to its first token."""
    decode_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """How likely the model found a token, and the most likely ones there."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """Token ids and their log-probabilities, the most likely first."""


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a request."""

    request_id: str
    index: int
    """Which of its `n` answers."""


@dataclass(frozen=True, slots=True)
class Reading(Event):
    """A pass has read more of the prompt."""

    num_tokens: int
    """Of the prompt so far."""


@dataclass(frozen=True, slots=True)
class NewToken(Event):
    """The answer has one more token."""

    token_id: int
    text: str
    """What the answer's text goes on with: "" while a character or a stop text is not whole."""
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True, slots=True)
class Scored(Event):
    """What was wanted by Score or Choices, in its order."""

    logprobs: tuple[float, ...]
    greedy: tuple[bool, ...]
    """Whether each was the most likely token of all."""
    top: tuple[tuple[tuple[int, float], ...], ...] = ()
    """The most likely tokens in each place, where Score wants them, as TokenLogprobs has them."""


@dataclass(frozen=True, slots=True)
class Finished(Event):
    """The last event of one answer, if nothing failed."""

    reason: FinishReason
    text: str
    """What the text still ends with after the last token."""
    counts: Counts


@dataclass(frozen=True, slots=True)
class Failed(Event):
    """The last event of one that failed, which others need not know of."""

    error: Exception


def _in_range(
    name: str, value: Any, least: float, most: float, *, least_is_out: bool = False
) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    is_in = is_number and least <= value <= most and abs(value) <= sys.float_info.max
    if is_in and not (least_is_out and value == least):
        return
    limits = f"above {least}" if least_is_out else f"at least {least}"
    limits += f" and at most {most}" if most < math.inf else ""
    raise InputError(f"{name} is {value!r}, expected a number {limits}")
