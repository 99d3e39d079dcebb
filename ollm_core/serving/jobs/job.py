"""A batch: rows of a file are answered together, and each answer is on the disk once it is there.

Killed at any moment, the next run goes on with exactly the rest. A row is known by its custom_id;
one without, or with that of another row, by its line.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from ollm_core.contracts.closing import Closing
from ollm_core.errors import DoesNotFitError, InputError, OllmError, ReadError, one_line
from ollm_core.files.untrusted_json import show
from ollm_core.serving.jobs.files import MAX_LINE_BYTES, AnswerFile, InputFile, Line, sync_directory
from ollm_core.serving.jobs.id_table import IdTable
from ollm_core.serving.jobs.settings import Settings, SettingsFile, differences
from ollm_core.serving.model import ServedModel
from ollm_core.serving.offline import Answered, run_each
from ollm_core.serving.openai.answers import Writer, answer_line, error_line
from ollm_core.serving.openai.requests import Asked, Defaults, Reader, RefusedError, Row, read_row
from ollm_core.serving.request import Event, NewToken, Request, SamplingParams
from ollm_core.serving.scheduler import Scheduler

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

_DONE, _COUNTED, _TAKEN = 1, 2, 4  # marks of a row: answered, met by the first walk, by the second
_BY_LINE = ("invalid_json_line", "missing_custom_id", "duplicate_custom_id")
"""Codes of errors whose rows are known by their line."""


class AnswersRequests(Protocol):
    """A model, as far as a batch needs one."""

    @property
    def served(self) -> ServedModel:
        """What a scheduler knows of it."""

    def open_scheduler(self, num_tokens: int = 0) -> Scheduler:
        """A scheduler over a new KV store, for `num_tokens` at once."""


@dataclass(frozen=True, slots=True)
class BatchProgress:
    """How far a batch is. Tokens and seconds are those of this run."""

    num_rows: int = 0
    """In the input."""
    num_found: int = 0
    """Of those, answered or refused by earlier runs."""
    num_answered: int = 0
    num_failed: int = 0
    """With a line in the error file."""
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    """Of those, computed for another row, or before."""
    num_new_tokens: int = 0
    seconds: float = 0.0

    @property
    def num_left(self) -> int:
        """Rows that have no line yet."""
        return self.num_rows - self.num_found - self.num_answered - self.num_failed


@dataclass(frozen=True, slots=True)
class _Met:
    """A row of the input."""

    line: int
    custom_id: str | None
    key: str
    """What it is known by."""
    row: Row | None
    refused: RefusedError | None = None
    """In place of `row`."""


@dataclass(frozen=True, slots=True)
class _Live:
    """A row that the scheduler has."""

    met: _Met
    asked: Asked


class BatchJob(Closing):
    """A batch that is to be begun, or gone on with. It holds its files open, and locked, until it
    is closed.
    """

    def __init__(
        self,
        rows: Path,
        output: Path,
        errors: Path | None = None,
        *,
        settings: Settings,
        anyway: bool = False,
    ) -> None:
        """`rows` are read to their end, to count them and to know them again. `settings` are what
        answers depend on. With `anyway` an output that was begun with others is gone on with.

        Raises InputError for files that cannot be used, or that are another batch's, and leaves
        them as they are.
        """
        self.rows, self.output = rows, output
        self.errors = errors or output.with_name(f"{output.stem}.errors{output.suffix or '.jsonl'}")
        self._table = IdTable()
        self._is_run = False
        self._settings = SettingsFile(output)
        with ExitStack() as opened:
            self._input = opened.enter_context(InputFile(rows))
            self._check_apart()
            self._answers = opened.enter_context(AnswerFile(output))
            opened.callback(self._answers.remove_if_empty)
            self._refusals = opened.enter_context(AnswerFile(self.errors))
            opened.callback(self._refusals.remove_if_empty)
            self._open(settings, anyway=anyway)
            self._opened = opened.pop_all()

    @property
    def progress(self) -> BatchProgress:
        """How far it is."""
        return self._progress

    @property
    def has_errors(self) -> bool:
        """Whether the error file has a line."""
        return not self._refusals.is_empty

    def run(
        self,
        model: AnswersRequests,
        name: str,
        defaults: Defaults | None = None,
        on_progress: Callable[[BatchProgress], None] = lambda _: None,
    ) -> BatchProgress:
        """Answer all rows that are left, in the order of their ends; `name` is what answers call
        the model. What a row is to blame for becomes a line in the error file. Raises OllmError for
        anything else: what is written stays, and another job goes on with the rest. To be called
        once.
        """
        if self._is_run:
            raise InputError("the batch has been run", hint="open another job: it goes on")
        self._is_run = True
        _Run(self, model, name, defaults or Defaults(), on_progress).all()
        if not self._progress.num_left:
            self._settings.remove()
        return self._progress

    def close(self) -> None:
        """Let go of the files. Leaves none that is empty. May be called twice."""
        if self._answers.is_open and self._answers.is_empty and self._refusals.is_empty:
            self._settings.remove()
        self._opened.close()

    # What there is.

    def _check_apart(self) -> None:
        """Raises InputError unless input and both outputs are three files."""
        paths = {"the input": self.rows, "the output": self.output, "the error file": self.errors}
        for (one, path), (other, same) in itertools.combinations(paths.items(), 2):
            is_same = path.resolve() == same.resolve()
            if is_same or (path.exists() and same.exists() and path.samefile(same)):
                raise InputError(f"{other} is {one}: {same}", hint="name another file")

    def _open(self, settings: Settings, *, anyway: bool) -> None:
        """Find what is answered, and check that it may be gone on with."""
        begun = self._settings.read()
        for file in (self._answers, self._refusals):
            for answer in file.answers():
                self._table.mark(_key_of(answer), _DONE)
        is_new = self._answers.is_empty and self._refusals.is_empty
        num_rows = num_found = 0
        for met in self._walk(_COUNTED):
            num_rows, num_found = num_rows + 1, num_found + self._is_done(met)
        self._progress = BatchProgress(num_rows, num_found)
        self._digest = self._input.digest
        settings = {**settings, "input": self._digest}
        if not is_new and begun is None and self._progress.num_left and not anyway:
            raise InputError(
                f"{self.output} has answers, and nothing says how they were made",
                hint="name another output; --anyway (anyway=True) goes on with it",
            )
        changed = differences(begun or {}, settings) if begun and not is_new else ""
        if changed and not anyway:
            raise InputError(
                f"{self.output} was begun with other settings: {changed}",
                hint="give the same, or name another output; --anyway (anyway=True) goes on with "
                "these",
            )
        self._answers.mend()
        self._refusals.mend()
        if not self._progress.num_left:
            self._settings.remove()
        elif begun != settings:
            self._settings.write(settings)
        sync_directory(self.output.parent)
        sync_directory(self.errors.parent)

    # For the run.

    def _walk(self, mark: int) -> Iterator[_Met]:
        """All rows in the order of the input. Which of two have the same name, `mark` tells."""
        for line in self._input.lines():
            yield self._met(line, mark)

    def _met(self, line: Line, mark: int) -> _Met:
        by_line = f"line {line.number}"
        try:
            if line.content is None:
                raise RefusedError(
                    f"the line is longer than {MAX_LINE_BYTES} bytes", code="invalid_json_line"
                )
            row = read_row(line.content)
        except RefusedError as refused:
            return _Met(line.number, None, by_line, None, refused)
        name = row.custom_id
        if self._table.mark(f"id {name}", mark) & mark:
            twice = RefusedError(
                f"a row before has the custom_id {show(name)}",
                code="duplicate_custom_id",
                param="custom_id",
            )
            return _Met(line.number, name, by_line, None, twice)
        return _Met(line.number, name, f"id {name}", row)

    def _is_done(self, met: _Met) -> bool:
        return bool(self._table.marks(met.key) & _DONE)

    def _left(self) -> Iterator[_Met]:
        """The rows that are to be answered. Raises InputError if the input is no longer what it
        was.
        """
        for met in self._walk(_TAKEN):
            if not self._is_done(met):
                yield met
        if self._input.digest != self._digest:
            raise InputError(f"{self.rows} was changed while it was read")

    def _write_answer(self, met: _Met, body: dict[str, Any], **counted: int) -> None:
        assert met.custom_id is not None
        self._answers.append(answer_line(met.custom_id, body))
        self._count(num_answered=1, **counted)

    def _write_refusal(self, met: _Met, code: str, message: str, param: str | None) -> None:
        self._refusals.append(error_line(met.custom_id, met.line, code, message, param))
        self._count(num_failed=1)

    def _count(self, **more: float) -> None:
        now = {name: getattr(self._progress, name) + value for name, value in more.items()}
        self._progress = replace(self._progress, **now)


class _Run:
    """One walk over the rows that are left."""

    def __init__(
        self,
        job: BatchJob,
        model: AnswersRequests,
        name: str,
        defaults: Defaults,
        on_progress: Callable[[BatchProgress], None],
    ) -> None:
        self._job, self._model, self._served = job, model, model.served
        if self._served.tokenizer is None:
            raise InputError(f"{name} has no tokenizer", hint="add its tokenizer.json")
        self._reader = Reader(self._served.tokenizer, defaults)
        self._writer = Writer(self._served.tokenizer, name)
        self._on_progress = on_progress
        self._began = time.perf_counter()
        self._live: dict[str, _Live] = {}
        self._in_vain: OllmError | None = None
        self._num_in_vain = 0

    def all(self) -> None:
        """Answer them. Raises OllmError."""
        requests = self._requests()
        first = list(itertools.islice(requests, _EXPECTED))
        if first:
            num_tokens = sum(map(_expected_tokens, first))
            with self._model.open_scheduler(num_tokens) as scheduler:
                together = itertools.chain(first, requests)
                first = []
                for request, answers in run_each(
                    scheduler, together, self._on_event, AHEAD, AHEAD_TOKENS
                ):
                    self._end(self._live.pop(request.request_id), answers)
        self._tell()
        if self._in_vain is not None:
            raise self._in_vain

    def _requests(self) -> Iterator[Request]:
        """Of the rows that can be answered; the others are told of at once."""
        for met in self._job._left():
            try:
                if met.row is None:
                    assert met.refused is not None
                    raise met.refused
                asked = self._reader.read(met.row)
                request = Request(
                    token_ids=asked.token_ids,
                    wanted=asked.sampling,
                    priority=PRIORITY,
                    keep=False,
                )
                self._check(request)
            except RefusedError as refused:
                self._refuse(met, refused.code, refused.message, refused.param)
            else:
                self._live[request.request_id] = _Live(met, asked)
                yield request

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

    def _end(self, live: _Live, answers: list[Answered]) -> None:
        """A row has ended, well or not."""
        failed = next((one.error for one in answers if one.error is not None), None)
        if failed is None:
            body = self._writer.body(live.asked, answers)
            self._job._write_answer(
                live.met,
                body,
                num_prompt_tokens=len(live.asked.token_ids),
                num_cached_tokens=min(one.counts.num_cached_tokens for one in answers),
            )
            self._num_in_vain = 0
            self._tell()
        elif isinstance(failed, ReadError | OSError):  # no row is to blame, and none would do
            raise failed
        elif isinstance(failed, DoesNotFitError) and not failed.memory:  # of the disk
            self._in_vain, self._num_in_vain = failed, self._num_in_vain + 1
            if self._num_in_vain == _MOST_IN_VAIN:
                raise failed
        else:
            self._refuse(live.met, _code_of(failed), one_line(failed))

    def _refuse(self, met: _Met, code: str, message: str, param: str | None = None) -> None:
        self._job._write_refusal(met, code, message, param)
        self._tell()

    def _on_event(self, event: Event) -> None:
        if isinstance(event, NewToken):
            self._job._count(num_new_tokens=1)
            self._tell()

    def _tell(self) -> None:
        now = time.perf_counter()
        self._job._count(seconds=now - self._began)
        self._began = now
        self._on_progress(self._job.progress)


def _key_of(answer: dict[str, Any]) -> str:
    """What the row of an answer is known by."""
    error = answer.get("error")
    if isinstance(error, dict) and (answer["custom_id"] is None or error.get("code") in _BY_LINE):
        return f"line {error.get('line')}"
    return f"id {answer['custom_id']}"


def _code_of(error: Exception) -> str:
    if isinstance(error, DoesNotFitError):
        return "does_not_fit"
    return "invalid_request" if isinstance(error, InputError) else "model_failed"


def _expected_tokens(request: Request) -> int:
    wanted = request.wanted
    assert isinstance(wanted, SamplingParams)
    return len(request.token_ids) + wanted.n * min(wanted.max_tokens, _EXPECTED_NEW)
