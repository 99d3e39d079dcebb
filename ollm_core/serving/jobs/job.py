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
from typing import Any

from ollm_core.contracts.closing import Closing
from ollm_core.errors import InputError
from ollm_core.files.untrusted_json import show
from ollm_core.serving.jobs.files import MAX_LINE_BYTES, AnswerFile, InputFile, Line, sync_directory
from ollm_core.serving.jobs.id_table import IdTable
from ollm_core.serving.jobs.rows import AnswersRequests, Outcome, RowAnswerer, TakenRow
from ollm_core.serving.jobs.settings import Settings, SettingsFile, differences
from ollm_core.serving.openai.answers import answer_line, error_line
from ollm_core.serving.openai.refused import RefusedError
from ollm_core.serving.openai.requests import Defaults, Row, read_row
from ollm_core.serving.request import Event, NewToken

_DONE, _COUNTED, _TAKEN = 1, 2, 4  # marks of a row: answered, met by the first walk, by the second
_BY_LINE = ("invalid_json_line", "missing_custom_id", "duplicate_custom_id")
"""Codes of errors whose rows are known by their line."""


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
        answerer = RowAnswerer(model, name, defaults)

        def on_event(event: Event) -> None:
            if isinstance(event, NewToken):
                self._count(num_new_tokens=1)
                self._tell(on_progress)

        def answer(rows: Iterator[TakenRow], tell: Callable[[Outcome], None]) -> None:
            answerer.answer(rows, tell, on_event)

        return self.run_by(answer, on_progress)

    def run_by(
        self,
        answer: Callable[[Iterator[TakenRow], Callable[[Outcome], None]], None],
        on_progress: Callable[[BatchProgress], None] = lambda _: None,
        *,
        counts_tokens: bool = False,
    ) -> BatchProgress:
        """As `run`, with whoever answers rows elsewhere: `answer` is given those that are left, and
        a function to tell what comes of each, in any order; of one told twice the first counts.
        With `counts_tokens` new tokens are counted as answers come.
        """
        if self._is_run:
            raise InputError("the batch has been run", hint="open another job: it goes on")
        self._is_run = True
        self._began = time.perf_counter()
        taken: dict[int, _Met] = {}

        def tell(outcome: Outcome) -> None:
            met = taken.pop(outcome.line, None)
            if met is None:
                return
            if outcome.body is None:
                self._write_refusal(met, outcome.code, outcome.message, outcome.param)
            else:
                self._write_answer(met, outcome.body, counts_tokens=counts_tokens)
            self._tell(on_progress)

        answer(self._taken(taken, on_progress), tell)
        self._tell(on_progress)
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

    def _taken(
        self, taken: dict[int, _Met], on_progress: Callable[[BatchProgress], None]
    ) -> Iterator[TakenRow]:
        """The rows that are left and can be read, each noted in `taken` by its line; the others are
        told of at once.
        """
        for met in self._left():
            if met.row is None:
                assert met.refused is not None
                refused = met.refused
                self._write_refusal(met, refused.code, refused.message, refused.param)
                self._tell(on_progress)
            else:
                taken[met.line] = met
                yield TakenRow(met.line, met.row)

    def _tell(self, on_progress: Callable[[BatchProgress], None]) -> None:
        now = time.perf_counter()
        self._count(seconds=now - self._began)
        self._began = now
        on_progress(self._progress)

    def _write_answer(self, met: _Met, body: dict[str, Any], *, counts_tokens: bool) -> None:
        assert met.custom_id is not None
        self._answers.append(answer_line(met.custom_id, body))
        usage = body["usage"]
        self._count(
            num_answered=1,
            num_prompt_tokens=usage["prompt_tokens"],
            num_cached_tokens=usage["prompt_tokens_details"]["cached_tokens"],
            num_new_tokens=usage["completion_tokens"] if counts_tokens else 0,
        )

    def _write_refusal(self, met: _Met, code: str, message: str, param: str | None) -> None:
        self._refusals.append(error_line(met.custom_id, met.line, code, message, param))
        self._count(num_failed=1)

    def _count(self, **more: float) -> None:
        now = {name: getattr(self._progress, name) + value for name, value in more.items()}
        self._progress = replace(self._progress, **now)


def _key_of(answer: dict[str, Any]) -> str:
    """What the row of an answer is known by."""
    error = answer.get("error")
    if isinstance(error, dict) and (answer["custom_id"] is None or error.get("code") in _BY_LINE):
        return f"line {error.get('line')}"
    return f"id {answer['custom_id']}"
