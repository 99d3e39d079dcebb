"""What the routes share: one model, its session, who understands bodies and who writes answers."""

from __future__ import annotations

import asyncio
import copy
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

from ollm_core.contracts.closing import Closing
from ollm_core.errors import InputError
from ollm_core.generate.causal_lm import StreamedModel
from ollm_core.server.asking import Asking
from ollm_core.server.cached import CachedTexts
from ollm_core.server.errors import stopping
from ollm_core.server.forecast import Forecasts
from ollm_core.server.history import MemoryHistory
from ollm_core.server.kept import KeptAnswers
from ollm_core.server.meter import Meter
from ollm_core.server.places import Places
from ollm_core.server.progress import PassWatch, standing
from ollm_core.server_options import ServerOptions
from ollm_core.serving.openai.answers import Writer
from ollm_core.serving.openai.requests import Defaults, Kind, Reader
from ollm_core.serving.openai.served import Body, read_body
from ollm_core.serving.request import Request
from ollm_core.serving.session import Session
from ollm_core.serving.structured import Grammars

Made = TypeVar("Made")
_MOST_BODIES = 4
"""Of the largest size, in memory at once."""


class Service(Closing):
    """Answers for one model, until it is closed. Of its methods only those of `Asking` wait for
    the model.
    """

    def __init__(
        self,
        model: StreamedModel,
        name: str,
        options: ServerOptions | None = None,
        defaults: Defaults | None = None,
        context: int = 0,
        forecasts: Forecasts | None = None,
        kv_dir: Path | None = None,
    ) -> None:
        """`name` is what answers call the model; `context` tokens are expected at once; `forecasts`
        are told to clients, and what is kept in `kv_dir`. The model stays the caller's. Raises
        InputError for one without a tokenizer, DoesNotFitError.
        """
        if model.tokenizer is None:
            raise InputError(f"{name} has no tokenizer", hint="add its tokenizer.json")
        self.model, self.name = model, name
        self.served = model.served
        self.options = options or ServerOptions()
        self.defaults = defaults or Defaults()
        self.forecasts = forecasts or Forecasts()
        self.started = time.time()
        # Of its own: what marks control tokens changes a tokenizer for a moment, while the thread
        # of the session decodes with the model's.
        self.tokenizer = copy.deepcopy(model.tokenizer)
        self.reader = Reader(self.tokenizer, self.defaults)
        self._grammars = Grammars(self.tokenizer, self.served.vocab_size, self.served.end_ids)
        self.writer = Writer(model.tokenizer, name)
        self.places = Places(
            int(self.options.max_requests), _MOST_BODIES * self.options.max_body_bytes
        )
        self.kept = KeptAnswers(self.options.keep_budget_bytes, float(self.options.keep_seconds))
        self.meter = Meter()
        self.history = MemoryHistory(model.accounts)
        self.watch = PassWatch(self.history.note)
        with ExitStack() as stack:
            scheduler = stack.enter_context(model.open_scheduler(context))
            self.session = Session(scheduler)
            stack.pop_all()
        self.cached = CachedTexts(self.session, model.sequence_bytes, kv_dir)
        model.on_progress(self.watch)
        self._reading = ThreadPoolExecutor(1, "reading")

    def close(self) -> None:
        """Cancel what runs. May be called twice."""
        self._reading.shutdown(wait=True, cancel_futures=True)
        self.session.close()
        self.kept.clear()
        self.model.on_progress(None)

    async def read(self, work: Callable[[], Made]) -> Made:
        """What `work` comes to, which may use `tokenizer` and `reader`: one at a time, in a thread
        of its own. Long documents take seconds.
        """
        try:
            return await asyncio.get_running_loop().run_in_executor(self._reading, work)
        except RuntimeError as error:
            if "shutdown" in str(error):
                raise stopping() from None
            raise

    async def read_body(self, kind: Kind, fields: Mapping[str, Any]) -> Body:
        """A body in OpenAI's words. Raises RefusedError."""
        return await self.read(
            lambda: read_body(self.reader, self.served, kind, fields, self._grammars)
        )

    def ask(self, requests: Sequence[Request]) -> Asking:
        """Raises RefusedRequestError if the session has ended."""
        if not self.session.is_open:
            raise stopping()
        return Asking(self.session, requests)

    def standing(self, asking: Asking, requests: Sequence[Request]) -> dict[str, Any]:
        """How far the request is that has furthest to go to its first token; see
        `ollm_core.server.progress`.
        """
        current = self.watch.current
        place = max(range(len(requests)), key=lambda one: len(requests[one].token_ids))
        return standing(len(requests[place].token_ids), asking.num_read(place), current)
