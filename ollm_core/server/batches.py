"""Batches of a server: one after another, in a thread of their own, beside other requests and after
them. Those that are not done go on when a server is started again.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ollm_core.contracts.closing import Closing
from ollm_core.errors import OllmError
from ollm_core.server.errors import RefusedRequestError
from ollm_core.server.file_store import FileStore, file_record, new_id
from ollm_core.server.service import Service
from ollm_core.serving.jobs.job import BatchJob, BatchProgress
from ollm_core.serving.jobs.settings import Settings, model_sample
from ollm_core.serving.jobs.shared import SharedModel, StoppedError
from ollm_core.serving.openai.requests import KINDS
from ollm_core.serving.openai.schemas import (
    OBJECT,
    TEXT,
    Field,
    Fields,
    check_body,
    ignored,
    one_of,
)

logger = logging.getLogger("ollm.server")

ACTIVE = ("validating", "in_progress", "finalizing", "cancelling")
"""States of batches that are not done."""
MAX_ACTIVE = 100
_WRITTEN_SECONDS = 1.0
"""Between two times that progress is kept."""
_TIMES = (
    "in_progress_at", "finalizing_at", "completed_at", "failed_at", "cancelling_at",
    "cancelled_at", "expires_at", "expired_at",
)  # fmt: skip
FIELDS: Fields = {
    "input_file_id": Field(TEXT, required=True),
    "endpoint": Field(one_of(*KINDS), required=True),
    "metadata": Field(OBJECT),
    **ignored("completion_window", "output_expires_after"),
}


class Batches(Closing):
    """Runs batches of files of `store`, until it is closed."""

    def __init__(self, service: Service, store: FileStore) -> None:
        """Batches that are not done are gone on with."""
        self._service, self._store = service, store
        self._lock = threading.Lock()
        self._waiting: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._running: tuple[str, SharedModel] | None = None
        self._closed = False
        left = [one["id"] for one in store.records("batch") if one.get("status") in ACTIVE]
        for batch_id in reversed(left):
            self._waiting.put(batch_id)
        self._thread = threading.Thread(target=self._work, name="batches", daemon=True)
        self._thread.start()

    def create(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """A batch of a file that is there. Raises RefusedRequestError, RefusedError."""
        check_body(FIELDS, fields)
        endpoint, input_id = str(fields["endpoint"]), str(fields["input_file_id"])
        metadata = fields.get("metadata")
        try:
            self._store.read(input_id, "file")  # a whole one, whose upload has ended
        except RefusedRequestError:
            raise RefusedRequestError(
                404, "there is no such file here", param="input_file_id"
            ) from None
        record: dict[str, Any] = {
            "id": new_id("batch"),
            "object": "batch",
            "endpoint": endpoint,
            "errors": None,
            "input_file_id": input_id,
            "completion_window": str(fields.get("completion_window", "24h"))[:16],
            "status": "validating",
            "output_file_id": None,
            "error_file_id": None,
            "created_at": int(time.time()),
            **dict.fromkeys(_TIMES),
            "request_counts": {"total": 0, "completed": 0, "failed": 0},
            "metadata": metadata,
            "files": [new_id("file"), new_id("file")],
        }
        with self._lock:
            num_active = sum(one["status"] in ACTIVE for one in self._store.records("batch"))
            if num_active >= MAX_ACTIVE:
                raise RefusedRequestError(
                    429, f"there are {num_active} batches already", headers={"Retry-After": "60"}
                )
            self._store.write(record)
            self._waiting.put(record["id"])
        return shown(record)

    def get(self, batch_id: str) -> dict[str, Any]:
        """How far one is. Raises RefusedRequestError."""
        return shown(self._store.read(batch_id, "batch"))

    def listed(self) -> list[dict[str, Any]]:
        """All, the newest first."""
        return [shown(one) for one in self._store.records("batch")]

    def cancel(self, batch_id: str) -> dict[str, Any]:
        """End one; what is answered stays. Raises RefusedRequestError."""
        with self._lock:
            record = self._store.read(batch_id, "batch")
            if record["status"] not in ACTIVE:
                raise RefusedRequestError(
                    409, f"the batch is {record['status']}", code="batch_ended"
                )
            record |= {"status": "cancelling", "cancelling_at": int(time.time())}
            self._store.write(record)
            if self._running is not None and self._running[0] == batch_id:
                self._running[1].stop()
        return shown(record)

    def uses(self, file_id: str) -> bool:
        """Whether a batch that is not done reads or writes a file."""
        return any(
            file_id in (one["input_file_id"], *one.get("files", ()))
            for one in self._store.records("batch")
            if one["status"] in ACTIVE
        )

    def close(self) -> None:
        """End the one that runs, to be gone on with. May be called twice."""
        with self._lock:
            self._closed = True
            self._waiting.put(None)
            if self._running is not None:
                self._running[1].stop()
        self._thread.join()

    # In the thread.

    def _work(self) -> None:
        while (batch_id := self._waiting.get()) is not None and not self._closed:
            try:
                self._run(batch_id)
            except Exception as error:  # noqa: BLE001 # the next one runs
                logger.error("batches: %s", type(error).__name__)

    def _run(self, batch_id: str) -> None:
        model = SharedModel(self._service.served, self._service.session)
        with self._lock:
            record = self._store.read(batch_id, "batch")
            if record["status"] == "cancelling":
                self._end(record, "cancelled")
                return
            if self._closed:
                return
            self._running = batch_id, model
            self._change(record, "in_progress")
        try:
            self._answer(record, model)
        except StoppedError:
            with self._lock:
                if self._store.read(batch_id, "batch")["status"] == "cancelling":
                    self._end(record, "cancelled")
        except (OllmError, OSError) as error:
            told = error.message if isinstance(error, OllmError) else "the storage failed"
            told = told.replace(f"{self._store.directory}/", "")
            record["errors"] = {"object": "list", "data": [{"message": told, "code": "failed"}]}
            with self._lock:
                self._end(record, "failed")
        else:
            with self._lock:
                self._end(record, "completed")
        finally:
            with self._lock:
                self._running = None

    def _answer(self, record: dict[str, Any], model: SharedModel) -> None:
        output, errors = (self._store.content(one) for one in record["files"])
        for path in (output, errors):
            path.touch(mode=0o600)  # a job would let others read it
        settings: Settings = {
            "model": model_sample(Path(self._service.model.tokenizer.name_or_path)),
            "dtype": str(self._service.model.dtype).removeprefix("torch."),
            "max_new_tokens": int(self._service.defaults.max_tokens),
        }
        rows = self._store.content(record["input_file_id"])
        with BatchJob(rows, output, errors, settings=settings) as job:
            written, before = 0.0, _num_lines(errors)

            def note(progress: BatchProgress) -> None:  # at each token
                nonlocal written
                if time.monotonic() - written < _WRITTEN_SECONDS and progress.num_left:
                    return
                written = time.monotonic()
                record["request_counts"] = counts(progress, before + progress.num_failed)
                with self._lock:
                    if self._store.read(record["id"], "batch")["status"] == "in_progress":
                        self._store.write(record)

            note(job.progress)
            job.run(model, self._service.name, self._service.defaults, note)

    def _change(self, record: dict[str, Any], status: str) -> None:
        record["status"] = status
        record[f"{status}_at"] = int(time.time())
        self._store.write(record)

    def _end(self, record: dict[str, Any], status: str) -> None:
        """Its files are there for its client, as far as they have something."""
        for name, file_id in zip(("output_file_id", "error_file_id"), record["files"], strict=True):
            path = self._store.content(file_id)
            if path.is_file() and path.stat().st_size:
                named = f"{record['id']}_{name.removesuffix('_file_id')}.jsonl"
                self._store.write(file_record(file_id, "batch_output", named, path.stat().st_size))
                record[name] = file_id
        self._change(record, status)


def _num_lines(path: Path) -> int:
    if not path.is_file():
        return 0
    with path.open("rb") as opened:
        return sum(1 for _ in opened)


def shown(record: Mapping[str, Any]) -> dict[str, Any]:
    """A batch as clients see it."""
    return {name: value for name, value in record.items() if name != "files"}


def counts(progress: BatchProgress, num_failed: int) -> dict[str, int]:
    """In OpenAI's form; of rows that earlier runs have ended, too."""
    ended = progress.num_rows - progress.num_left
    return {
        "total": progress.num_rows,
        "completed": ended - num_failed,
        "failed": num_failed,
    }
