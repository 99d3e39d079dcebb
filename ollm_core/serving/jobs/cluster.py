"""Rows of a batch on a Ray cluster: actors hold the model, Ray Data hands out rows.

Ray starts a worker anew that has died and gives its rows to another; answers come back to the job,
which writes them. Source: `ray.data.Dataset.map_batches` with a class, in Ray's documentation.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from itertools import chain
from typing import Any

from ollm_core.errors import OllmError, UnsupportedError, one_line
from ollm_core.files.untrusted_json import parse_object
from ollm_core.serving.jobs.rows import AnswersRequests, Outcome, RowAnswerer, TakenRow
from ollm_core.serving.openai.requests import Defaults, Row

ROWS_AT_ONCE = 64
"""Rows that a worker answers together. Those of one that dies are answered again."""
_GO_ON = "the same command goes on with the rows that are left"


class RowWorker:
    """What an actor runs: the model, and rows that come as columns of a batch."""

    def __init__(
        self, open_model: Callable[[], AnswersRequests], name: str, defaults: Defaults
    ) -> None:
        """`open_model` is called on the worker's machine."""
        self._answerer = RowAnswerer(open_model(), name, defaults)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[str]]:
        """`row` holds JSON of TakenRows -> `outcome`, JSON of what comes of each."""
        found: list[str] = []
        self._answerer.answer(
            (_taken(str(row)) for row in batch["row"]),
            lambda outcome: found.append(json.dumps(asdict(outcome))),
        )
        return {"outcome": found}


class Cluster:
    """An existing Ray cluster, to answer rows on."""

    def __init__(self, address: str, num_workers: int | None = None) -> None:
        """`address` is Ray's: "host:port", "ray://host:port", "auto", or "local" for one on this
        machine alone. `num_workers` models are opened, by default one for each node. Raises
        UnsupportedError without Ray, OllmError where there is no cluster.
        """
        try:
            import ray
            import ray.data
        except ImportError as error:
            raise UnsupportedError(
                f"Ray is not here: {one_line(error)}", hint="pip install 'ollm-core[ray]'"
            ) from error
        self._ray = ray
        # What Ray says while it works is for its own log files.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        for part in ("ray", "ray.data"):
            logging.getLogger(part).setLevel(logging.ERROR)
        try:
            ray.init(
                address=None if address == "local" else address,
                ignore_reinit_error=True,
                log_to_driver=False,
                logging_level="ERROR",
            )
        except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
            raise OllmError(
                f"no Ray cluster at {address}: {one_line(error)}",
                hint="start one by ray start --head, or give --ray local",
            ) from error
        ray.data.DataContext.get_current().enable_progress_bars = False
        nodes = sum(node["Alive"] for node in ray.nodes())
        self.num_workers = num_workers or max(nodes, 1)

    def close(self) -> None:
        """Let go of the cluster, which goes on."""
        self._ray.shutdown()

    def answer(
        self,
        rows: Iterator[TakenRow],
        tell: Callable[[Outcome], None],
        *,
        open_model: Callable[[], AnswersRequests],
        name: str,
        defaults: Defaults,
        num_gpus: int = 0,
    ) -> None:
        """Answer `rows` on the workers; each calls `open_model`, which can be pickled, and takes
        `num_gpus` of its machine's. Raises OllmError where the workers cannot.
        """
        first = next(rows, None)
        if first is None:
            return
        data = self._ray.data
        items = [{"row": json.dumps(_told(one))} for one in chain([first], rows)]
        # Answers come back a block at a time.
        num_blocks = max(-(-len(items) // ROWS_AT_ONCE), min(self.num_workers, len(items)))
        dataset = data.from_items(items, override_num_blocks=num_blocks)
        del items
        answered = dataset.map_batches(
            RowWorker,
            fn_constructor_args=(open_model, name, defaults),
            batch_size=ROWS_AT_ONCE,
            compute=data.ActorPoolStrategy(size=self.num_workers),
            num_gpus=num_gpus,
        )
        try:
            for row in answered.iter_rows():
                tell(Outcome(**parse_object(row["outcome"].encode())))
        except self._ray.exceptions.RayError as error:
            raise OllmError(f"the workers ended: {_reason(error)}", hint=_GO_ON) from error


def _told(taken: TakenRow) -> dict[str, Any]:
    return {
        "line": taken.line,
        "custom_id": taken.row.custom_id,
        "fields": dict(taken.row.fields),
    }


def _taken(text: str) -> TakenRow:
    found = parse_object(text.encode())
    return TakenRow(found["line"], Row(found["custom_id"], found["fields"]))


def _reason(error: BaseException) -> str:
    """The last line of a trace that came over the network says what was raised."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
