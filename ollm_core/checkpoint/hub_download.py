"""Fetches files of one hub repository, several at once, by the hub's own client; Ctrl-C ends it at
once, however slow the line is.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_WORKERS = 8
_LOOK_SECONDS = 0.2
_END_SECONDS = 5.0
_BAR = "{desc} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} {rate_fmt} {remaining}"


def download(
    repository: str,
    revision: str,
    names: Iterable[str],
    directory: Path | None = None,
    *,
    force: bool = False,
    shown_bytes: int = 0,
) -> list[Path]:
    """Fetch the files into `directory`, or into the hub's cache; -> where each is, in the order of
    `names`. With `shown_bytes`, how many are to come, a bar on stderr shows them.

    Raises what the hub's client raises, for the first file that fails; others are then not begun.
    """
    from huggingface_hub import hf_hub_download
    from tqdm import tqdm

    wanted = list(names)
    bar = tqdm(
        desc=repository.split("/")[-1][:32],
        total=shown_bytes,
        unit="B",
        unit_scale=True,
        bar_format=_BAR,
        leave=False,
        dynamic_ncols=True,
        disable=not shown_bytes,
    )
    part_type, stop = _part_of(bar)
    todo: queue.SimpleQueue[int] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[int, str | BaseException]] = queue.SimpleQueue()
    for index in range(len(wanted)):
        todo.put(index)

    def work() -> None:
        while not stop.is_set():
            try:
                index = todo.get_nowait()
            except queue.Empty:
                return
            try:
                path = hf_hub_download(
                    repository,
                    wanted[index],
                    revision=revision,
                    local_dir=directory,
                    force_download=force,
                    tqdm_class=part_type,
                )
                done.put((index, path))
            except BaseException as error:  # noqa: BLE001 (it is raised in the main thread)
                done.put((index, error))

    # The client's own pool would wait for its threads on Ctrl-C, and each may have hours to go.
    threads = [
        threading.Thread(target=work, name="ollm-pull", daemon=True)
        for _ in range(min(_WORKERS, len(wanted)))
    ]
    for thread in threads:
        thread.start()
    found: dict[int, Path] = {}
    try:
        while len(found) < len(wanted):
            try:
                index, path = done.get(timeout=_LOOK_SECONDS)
            except queue.Empty:
                continue
            if isinstance(path, BaseException):
                raise path
            found[index] = Path(path)
    except Exception:
        stop.set()
        until = time.monotonic() + _END_SECONDS
        for thread in threads:  # so that nobody writes to a directory which is cleared away
            thread.join(max(until - time.monotonic(), 0))
        raise
    finally:
        stop.set()
        bar.close()
    return [found[index] for index in range(len(wanted))]


class _Stopped(Exception):
    """Ends the download of a file that nobody waits for any more."""


def _part_of(bar: Any) -> tuple[type, threading.Event]:
    """What the client takes for its bar of one file: it moves `bar` on, until the event is set."""
    stop, lock = threading.Event(), threading.Lock()

    class Part:
        def __init__(self, *_: object, **__: object) -> None:
            pass

        def __enter__(self) -> Part:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def update(self, num_bytes: float | None = 1) -> None:
            """So many more bytes of the file are there."""
            if stop.is_set():
                raise _Stopped
            with lock:
                bar.update(num_bytes or 0)

        def __getattr__(self, name: str) -> Any:
            """All else that a bar can do is of no interest."""
            if name.startswith("__"):
                raise AttributeError(name)
            return lambda *_, **__: None

    return Part, stop
