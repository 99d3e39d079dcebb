"""The draft-length controller: how many tokens are worth drafting, from what drafts have cost and
gained in this text so far.

The controller knows seconds and counts. It knows nothing of tokens, models or clocks.

**What it may lose.** Let c be the seconds of a pass over one token, without a draft. A pass that
gave t tokens would have been t passes, so its allowance is 1.05 t c, and what it and the draft
source took is set against that. `_spare` is the sum of those differences. A draft is only asked for
if `_spare` bears its worst case: no token right, and every drafted token as dear as a pass of its
own (a pass over two tokens reads and computes no more than two passes), or less where that length
or a shorter one has been measured. So `_spare` never falls below zero, and a text takes at most
1.05 times what it would have taken without drafts. Two things come on top. The prompt gives a start
of a twentieth of its own time, at most one pass: still a twentieth of the whole. And the time of
the very first question to a draft source cannot be known before it is asked, nor what a draft does
to the pass after it, where weights come back that had made room; they are paid back before there is
another draft. So is what a source takes to read the text before it can be asked, beyond what is
left of the prompt's twentieth. All this holds as far as costs hold still; they are measured again
and again, and the newest count.

**How it chooses.** A draft of n gives 1 + a_1 + a_1 a_2 + ... tokens, where a_i is how often
position i was right when all before it were. The length that gives most tokens for its seconds, 0
included, is taken. A length that has not been measured lately counts as no dearer than the next
shorter one: it is then tried, and seen. Where nothing pays, one token is tried now and then. What
a try has lost is followed by twenty times as many seconds without one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Protocol

_SHARE = 0.05  # of the time that may be lost
_WINDOW = 5  # measurements of one length that count
_STALE = 64  # passes after which a measurement does not count any more
_KEEP = 0.8  # of what was seen of earlier drafts, when there is another


class DraftLength(Protocol):
    """Decides how many tokens to draft and to check, pass by pass, in one text."""

    def ask(self, limit: int) -> int:
        """How many tokens, at most `limit`, to ask the draft source for; 0: do not ask it."""

    def answered(self, num_asked: int, num_given: int, seconds: float) -> int:
        """The source took `seconds` -> how many of the given tokens to check."""

    def caught_up(self, seconds: float) -> None:
        """The source took `seconds` to read the text so far, before it is asked: once, or seldom,
        and not for each draft.
        """

    def checked(self, num_checked: int, num_right: int, seconds: float) -> None:
        """A pass over one token and `num_checked` drafted ones took `seconds`, and the first
        `num_right` of those were right.
        """

    def started(self, seconds: float) -> None:
        """The prompt has been read in `seconds`. Said once, before anything else."""


class FixedLength(DraftLength):
    """The same number always."""

    def __init__(self, num_tokens: int) -> None:
        self._num_tokens = num_tokens

    def ask(self, limit: int) -> int:
        """See DraftLength."""
        return min(self._num_tokens, limit)

    def answered(self, num_asked: int, num_given: int, seconds: float) -> int:
        """See DraftLength."""
        return num_given

    def caught_up(self, seconds: float) -> None:
        """See DraftLength."""

    def checked(self, num_checked: int, num_right: int, seconds: float) -> None:
        """See DraftLength."""

    def started(self, seconds: float) -> None:
        """See DraftLength."""


def draft_length(longest: int, fixed: int | None, *, sampling: bool) -> DraftLength:
    """What decides for one text: a fixed number, if there is one, or the controller. Sampled
    text depends on where drafts end, and the controller on the clock: there it is fixed too.
    """
    if fixed is not None or sampling:
        return FixedLength(fixed or longest)
    return DraftLengthController(longest)


class DraftLengthController(DraftLength):
    """The number that pays, at most `longest`; see this module."""

    def __init__(self, longest: int) -> None:
        self._longest = longest
        self._passes = _Costs()
        self._asking = _Costs()
        self._seen = [0.0] * longest  # of position i, when all before it were right
        self._right = [0.0] * longest
        self._answers = 1.0  # the share of questions that were answered with tokens
        self._prompt_seconds = 0.0
        self._prompt_share: float | None = None  # of the prompt's time, not spent on reading it
        self._spare: float | None = None  # None until c is known
        self._rest = 0.0  # seconds without a try to come
        self._trying = False
        self._after_draft = False
        self._asked_seconds = 0.0  # since the last pass

    def started(self, seconds: float) -> None:
        """See DraftLength."""
        self._prompt_seconds = seconds

    def ask(self, limit: int) -> int:
        """See DraftLength."""
        self._trying = False
        # The first pass after a prompt may still load what stays in memory: two are needed.
        if limit < 1 or not self._passes.is_settled(0) or self._passes.age(0) > _STALE:
            return 0
        known = self._passes.longest_settled
        limit = min(limit, self._longest, max(2 * self._passes.longest, 1))
        length = self._best(limit, self._asking)
        if length > known or length == 0:
            self._trying = self._rest <= 0
            length = max(length, 1) if self._trying else self._best(min(limit, known), self._asking)
        while length and not self._bears(length):
            length //= 2
        return length

    def answered(self, num_asked: int, num_given: int, seconds: float) -> int:
        """See DraftLength."""
        self._asking.add(num_asked, seconds)
        self._asked_seconds += seconds
        answers = _KEEP * self._answers + (1 - _KEEP) * (num_given > 0)
        self._answers = max(answers, 0.01)
        return num_given if self._trying else self._best(num_given)

    def caught_up(self, seconds: float) -> None:
        """See DraftLength. A twentieth of the prompt's time, less what drafts began with, is there
        for it; the rest is paid back before there is a draft.
        """
        if self._spare is None or self._prompt_share is None:
            return  # asked before anything was measured, which `ask` does not allow
        given = min(seconds, self._prompt_share)
        self._prompt_share -= given
        self._spare -= seconds - given

    def checked(self, num_checked: int, num_right: int, seconds: float) -> None:
        """See DraftLength."""
        alone = not (num_checked or self._after_draft)
        if num_checked or alone:
            self._passes.add(num_checked, seconds)
        self._passes.tick()
        single = self._passes.likely(0)
        took = seconds
        if not alone:  # much more than ever: not for the draft, something else was busy
            took = min(seconds, max(2 * single, self._passes.at_most(num_checked, single)))
        took, self._asked_seconds = took + self._asked_seconds, 0.0
        worth = seconds if alone else (num_right + 1) * single
        if self._spare is None:
            self._spare = min(_SHARE * self._prompt_seconds, single)
            self._prompt_share = _SHARE * self._prompt_seconds - self._spare
        self._spare += (1 + _SHARE) * worth - took
        self._rest -= took
        if self._trying and took > worth:
            self._rest = (took - worth) / _SHARE
        self._after_draft = num_checked > 0
        for i in range(min(num_right + 1, num_checked)):
            self._seen[i] = _KEEP * self._seen[i] + 1
            self._right[i] = _KEEP * self._right[i] + (i < num_right)

    def _best(self, limit: int, asking: _Costs | None = None) -> int:
        """The length up to `limit` that gives most tokens for its seconds."""
        best, most = 0, 1 / self._passes.likely(0)
        for length, tokens in enumerate(self._tokens(limit)[1:], start=1):
            seconds = self._passes.likely(length)
            if asking is not None:
                seconds += asking.likely(length) / self._answers
            if tokens / seconds > most:
                best, most = length, tokens / seconds
        return best

    def _tokens(self, limit: int) -> list[float]:
        """What a draft of 0, 1, ... `limit` tokens gives on the average, the pass's own
        included.
        """
        found, chance, expected = [1.0], 1.0, 0.5
        for i in range(limit):
            expected = (self._right[i] + expected) / (self._seen[i] + 1)
            chance *= expected
            found.append(found[-1] + chance)
        return found

    def _bears(self, length: int) -> bool:
        """Whether a draft of `length` may be lost."""
        single = self._passes.likely(0)
        worst = self._asking.at_most(length) + self._passes.at_most(length, single)
        return self._spare is not None and self._spare + (1 + _SHARE) * single >= worst


class _Costs:
    """Seconds by number of tokens, as measured lately."""

    def __init__(self) -> None:
        self._found: dict[int, deque[float]] = {}
        self._ages: dict[int, int] = {}

    def add(self, length: int, seconds: float) -> None:
        """A measurement."""
        self._found.setdefault(length, deque(maxlen=_WINDOW)).append(max(seconds, 1e-9))
        self._ages[length] = 0

    def tick(self) -> None:
        """A pass has gone by. Lengths other than 0 are forgotten when they are stale."""
        for length in [*self._found]:
            self._ages[length] += 1
            if length and self._ages[length] > _STALE:
                del self._found[length]

    def age(self, length: int) -> int:
        """Passes since the last measurement."""
        return self._ages[length]

    @property
    def longest(self) -> int:
        """The longest that was measured."""
        return max(self._found, default=0)

    @property
    def longest_settled(self) -> int:
        """The longest of those that `is_settled`."""
        return max(filter(self.is_settled, self._found), default=0)

    def is_settled(self, length: int) -> bool:
        """Whether there is more than one measurement: the first may hold what comes but once."""
        return len(self._found.get(length, ())) > 1

    def likely(self, length: int) -> float:
        """What `length` takes: between two settled lengths on the line from one to the other, after
        the last one no more than that takes.
        """
        settled = sorted(filter(self.is_settled, self._found)) or sorted(self._found)
        if not settled:
            return 0.0
        below = max((n for n in settled if n <= length), default=settled[0])
        above = min((n for n in settled if n >= length), default=below)
        low, high = _typical(self._found[below]), _typical(self._found[above])
        share = (length - below) / (above - below) if above > below else 0.0
        return low + share * (high - low)

    def at_most(self, length: int, each: float | None = None) -> float:
        """The most that `length` may take, if no length takes more than a longer one, and each
        token at most `each` (default: what the shortest length took) beside a shorter one.
        """
        if not self._found:
            return 0.0
        if self.is_settled(length):
            return _typical(self._found[length])
        each = _typical(self._found[min(self._found)]) if each is None else each
        return min(
            _typical(seconds) + max(length - n, 0) * each for n, seconds in self._found.items()
        )


def _typical(values: Sequence[float]) -> float:
    """Of five the second least: what else the machine does makes passes longer, never shorter."""
    return sorted(values)[(len(values) - 1) // 3]
