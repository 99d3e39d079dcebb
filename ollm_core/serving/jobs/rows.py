"""Answers rows of a batch with one model, many at once. Where they come from, and where answers go,
is a job's.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from ollm_core.errors import DoesNotFitError, InputError, ReadError, one_line
from ollm_core.serving.model import ServedModel
from ollm_core.serving.offline import Steps, run_each
from ollm_core.serving.openai.answers import Writer
from ollm_core.serving.openai.refused import RefusedError
from ollm_core.serving.openai.requests import Asked, Defaults, Reader, Row
from ollm_core.serving.request import Event, Request, SamplingParams

PRIORITY = 1
"""After whoever waits for an answer."""
AHEAD = 384
"""Rows that are read before others are answered: more than a pass takes."""
AHEAD_TOKENS = 1 << 20
"""Tokens of their prompts, which take some 50 bytes each."""
_EXPECTED = 32
"""Rows whose lengths say how much memory to expect."""
_EXPECTED_NEW = 512
"""New tokens of an answer, at most, for that."""
_MOST_IN_VAIN = 8
"""Rows in turn that find no room on the disk, before the run is given up."""


class AnswersRequests(Protocol):
    """A model, as far as a batch needs one."""

    @property
    def served(self) -> ServedModel:
        """What a scheduler knows of it."""

    def open_scheduler(self, num_tokens: int = 0) -> AbstractContextManager[Steps]:
        """A scheduler, for `num_tokens` at once. Closed after use."""


@dataclass(frozen=True, slots=True)
class TakenRow:
    """A row of the input."""

    line: int
    """From 1."""
    row: Row


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a row: the body of its answer, or why there is none."""

    line: int
    body: dict[str, Any] | None = None
    code: str = ""
    message: str = ""
    param: str | None = None


class RowAnswerer:
    """Answers rows with one model."""

    def __init__(self, model: AnswersRequests, name: str, defaults: Defaults | None = None) -> None:
        """`name` is what answers call the model. Raises InputError for one without a tokenizer."""
        self._model, self._served = model, model.served
        if self._served.tokenizer is None:
            raise InputError(f"{name} has no tokenizer", hint="add its tokenizer.json")
        self._reader = Reader(self._served.tokenizer, defaults or Defaults())
        self._writer = Writer(self._served.tokenizer, name)

    def answer(
        self,
        rows: Iterable[TakenRow],
        tell: Callable[[Outcome], None],
        on_event: Callable[[Event], None] = lambda _: None,
    ) -> None:
        """Tell what comes of each row, in the order of their ends; of `rows` only as many are taken
        as are soon in a pass. Raises OllmError for what no row is to blame for.
        """
        live: dict[str, tuple[TakenRow, Asked]] = {}
        num_in_vain, in_vain = 0, None

        def requests() -> Iterator[Request]:
            for taken in rows:
                try:
                    asked = self._reader.read(taken.row)
                    request = Request(
                        token_ids=asked.token_ids,
                        wanted=asked.sampling,
                        priority=PRIORITY,
                        keep=False,
                    )
                    self._check(request)
                except RefusedError as error:
                    tell(Outcome(taken.line, None, error.code, error.message, error.param))
                else:
                    live[request.request_id] = taken, asked
                    yield request

        wanted = requests()
        first = list(itertools.islice(wanted, _EXPECTED))
        if first:
            num_tokens = sum(map(_expected_tokens, first))
            with self._model.open_scheduler(num_tokens) as scheduler:
                together = itertools.chain(first, wanted)
                first = []
                for request, answers in run_each(
                    scheduler, together, on_event, AHEAD, AHEAD_TOKENS
                ):
                    taken, asked = live.pop(request.request_id)
                    failed = next((one.error for one in answers if one.error is not None), None)
                    if failed is None:
                        num_in_vain = 0
                        tell(Outcome(taken.line, self._writer.body(asked, answers)))
                    elif _no_room_on_disk(failed):
                        in_vain, num_in_vain = failed, num_in_vain + 1
                        if num_in_vain == _MOST_IN_VAIN:
                            raise failed
                    else:
                        tell(_failed(taken, failed))
        if in_vain is not None:
            raise in_vain

    def _check(self, request: Request) -> None:
        most, num_tokens = self._served.max_positions, len(request.token_ids)
        if most is not None and num_tokens > most:
            raise RefusedError(
                f"the prompt has {num_tokens} tokens, the model {most} positions",
                code="context_length_exceeded",
            )
        try:
            self._served.check(request)
        except InputError as error:
            raise RefusedError(error.message, code="invalid_prompt") from error


def _no_room_on_disk(error: Exception) -> bool:
    return isinstance(error, DoesNotFitError) and not error.memory


def _failed(taken: TakenRow, error: Exception) -> Outcome:
    """Raises an error that no row is to blame for, and that any would meet."""
    if isinstance(error, ReadError | OSError):
        raise error
    if isinstance(error, DoesNotFitError):
        code = "does_not_fit"
    else:
        code = "invalid_request" if isinstance(error, InputError) else "model_failed"
    return Outcome(taken.line, None, code, one_line(error))


def _expected_tokens(request: Request) -> int:
    wanted = request.wanted
    assert isinstance(wanted, SamplingParams)
    return len(request.token_ids) + wanted.n * min(wanted.max_tokens, _EXPECTED_NEW)
