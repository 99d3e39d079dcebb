"""Reads a file of the user as text: the one place for documents that a model is to read."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ollm_core.documents import process
from ollm_core.documents.extracted import Refused
from ollm_core.documents.kinds import decoded, kind_of
from ollm_core.errors import InputError, OllmError
from ollm_core.files.paths import absolute
from ollm_core.files.untrusted_json import parse_object
from ollm_core.memory.sizes import format_size

MAX_BYTES = 100_000_000
"""Of a file: more text than any model has positions for. A device never ends."""

_CONTROLS = re.compile(r"[\x00-\x08\x0b\x0e-\x1f\x7f\ud800-\udfff]")
_LIBRARY = {"pdf": "pypdf"}


@dataclass(frozen=True, slots=True)
class Limits:
    """What reading may take, beside what grows with the file."""

    memory_bytes: int = 1 << 30
    cpu_seconds: int = 60
    """And one for each page of a PDF."""


def read_document(
    file: str | os.PathLike[str],
    *,
    as_text: bool = False,
    remark: Callable[[str], None] = lambda line: None,
    limits: Limits | None = None,
) -> str:
    """The text of a plain text, Markdown, HTML, PDF or DOCX file, whatever its name is.

    Plain text and Markdown are returned as they are, without the newlines at their end; with
    `as_text` HTML too. `remark` is told in one line each what of a document was left out, as pages
    that are pictures. Raises InputError, in one line, for a file that cannot be read or has no
    text, and for what takes more than `limits`.
    """
    path = absolute(file)
    try:
        with path.open("rb") as opened:
            text = read_opened(opened, str(path), as_text=as_text, remark=remark, limits=limits)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    if not text.strip():
        raise InputError(f"{path}: it is empty")
    return text


def read_opened(
    opened: BinaryIO,
    name: str,
    *,
    as_text: bool = False,
    remark: Callable[[str], None] = lambda line: None,
    limits: Limits | None = None,
) -> str:
    """As `read_document`, of a file that is open, as stdin is; `name` is what errors call it. An
    empty text is one. Raises InputError and OSError.
    """
    data = opened.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise InputError(f"{name}: more than the {format_size(MAX_BYTES)} that a text may have")
    try:
        kind = kind_of(data, Path(name).suffix)
        if kind == "text" or (kind == "html" and as_text):
            return decoded(data).rstrip("\n")
        found = _run(kind, data, name, limits or Limits())
        if "refused" in found:
            raise Refused(found["refused"], hint=found.get("hint", ""))
    except Refused as refused:
        raise InputError(f"{name}: {refused.reason}", hint=refused.hint) from None
    for line in found["remarks"]:
        remark(f"{name}: {line}")
    text = tidy(found["text"])
    if not text:
        raise InputError(f"{name}: it has no text")
    return text


def tidy(text: str) -> str:
    """Text of a format without characters that are no text, spaces at ends of lines, and more than
    one empty line at once.
    """
    text = _CONTROLS.sub("", text.replace("\r\n", "\n").replace("\r", "\n").replace("\f", "\n"))
    text = re.sub(r"[ \t]+\n", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n")


def _run(kind: str, data: bytes, name: str, limits: Limits) -> dict[str, Any]:
    """The answer of `process`, or why there is none."""
    library = _LIBRARY.get(kind)
    if library and importlib.util.find_spec(library) is None:
        raise InputError(
            f"{name}: reading a {kind.upper()} needs {library}, which is not installed",
            hint="pip install 'ollm-core[documents]'",
        )
    memory = limits.memory_bytes + 16 * len(data)
    cpu_seconds = limits.cpu_seconds + len(data) // 200_000
    ours = str(Path(__file__).parents[2])
    path = filter(os.path.isabs, sys.path)  # nothing is imported from where the user works
    arguments = (kind, memory, cpu_seconds, ours, *path)
    program = [sys.executable, "-I", "-S", process.__file__, *map(str, arguments)]
    try:
        done = subprocess.run(program, input=data, capture_output=True, check=False)
    except OSError as error:
        reason = f"cannot start {sys.executable}: {error.strerror}"
        raise OllmError(f"{name}: {reason}") from error
    if done.returncode == -signal.SIGXCPU:
        raise Refused("reading it takes too long", hint="give a part of it, or its plain text")
    if done.returncode:
        last = (done.stderr.decode(errors="replace").strip().splitlines() or [""])[-1]
        raise Refused(f"reading it ended with code {done.returncode} {last!a}")
    return parse_object(done.stdout)
