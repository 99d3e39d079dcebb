"""`ollm serve` in a process of its own, with limits of memory and disk, and a client of it."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks import ROOT
from benchmarks.tools.children import CAPPED

_ADDRESS = re.compile(r" at (http://\S+)/v1 ")
_SERVE = (
    "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); "
    "from benchmarks.tools.throttle import throttled; from ollm import main\n"
    "limit, directory, sys.argv = int(sys.argv[2]), Path(sys.argv[3]), ['ollm', *sys.argv[4:]]\n"
    "with throttled(directory, limit): main()"
)
"""Arguments: the checkout, bytes per second, the directory whose disk that is, those of `ollm`."""


@dataclass(frozen=True, slots=True)
class Server:
    """One that runs."""

    host: str
    port: int
    pid: int
    """Of the process that serves."""


@contextmanager
def serving(
    checkpoint: Path, options: Sequence[str], *, cap: int = 0, throttle: int = 0
) -> Iterator[Server]:
    """A server for the length of a `with`, with at most `cap` MiB of memory, page cache included,
    and `throttle` bytes per second of the disk; 0 is no limit. Raises RuntimeError if it does not
    start.
    """
    command = [sys.executable, "-c", _SERVE, str(ROOT), str(throttle), str(checkpoint)]
    command += ["serve", str(checkpoint), "--port", "0", *options]
    if cap:
        command = [str(CAPPED), str(cap), *command]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        told = []
        try:
            while line := process.stderr.readline():
                told.append(line)
                if match := _ADDRESS.search(line):
                    place = urlsplit(match[1])
                    yield Server(str(place.hostname), int(place.port or 0), _serves(process.pid))
                    break
            else:
                raise RuntimeError(f"no server: {''.join(told[-3:]).strip()}")
        finally:
            os.kill(_serves(process.pid), signal.SIGTERM)
            process.stderr.read()


def _serves(pid: int) -> int:
    """The process itself, or what it has started."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return _serves(int(children[0])) if children else pid


@dataclass(slots=True)
class Streamed:
    """What came of one stream."""

    status: int
    first_byte_seconds: float
    token_seconds: list[float] = field(default_factory=list)
    """When each piece of text came, since the beginning."""
    seconds: float = 0.0
    texts: list[str] = field(default_factory=list)
    completion_tokens: int = 0
    prompt_tokens: int = 0

    @property
    def text(self) -> str:
        return "".join(self.texts)


def stream(server: Server, path: str, body: Mapping[str, Any]) -> Streamed:
    """Ask for a stream, and read it to its end."""
    connection = http.client.HTTPConnection(server.host, server.port, timeout=600)
    began = time.perf_counter()
    data = {**body, "stream": True, "stream_options": {"include_usage": True}}
    connection.request(
        "POST", path, json.dumps(data), {"Content-Type": "application/json", "Connection": "close"}
    )
    answer = connection.getresponse()
    line = answer.readline()
    found = Streamed(answer.status, time.perf_counter() - began)
    while line:
        if line.startswith(b"data: {"):
            _take(found, json.loads(line[6:]), began)
        line = answer.readline()
    found.seconds = time.perf_counter() - began
    connection.close()
    return found


def _take(found: Streamed, event: Mapping[str, Any], began: float) -> None:
    for choice in event.get("choices", ()):
        text = choice.get("text") or choice.get("delta", {}).get("content") or ""
        if text:
            found.token_seconds.append(time.perf_counter() - began)
            found.texts.append(text)
    if usage := event.get("usage"):
        found.completion_tokens = usage["completion_tokens"]
        found.prompt_tokens = usage["prompt_tokens"]
