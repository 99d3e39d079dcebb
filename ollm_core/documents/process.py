"""Reads one document in a process of its own, whose memory and time the kernel bounds.

Run as a program. A document is hostile: a kilobyte of PDF may unpack to gigabytes or lead a parser
in circles, and nothing inside a Python process can stop that for sure.

Arguments: the kind (`html`, `pdf` or `docx`), bytes of memory, seconds of processor time, and the
directories of Python's path. On stdin, the file. On stdout, `{"text": ..., "remarks": [...]}` or
`{"refused": reason, "hint": ...}`.
"""

from __future__ import annotations

import sys
from typing import Any


def extract(kind: str, data: bytes) -> dict[str, Any]:
    """The answer; see the module's docstring."""
    from ollm_core.documents import docx_text, html_text, pdf_text
    from ollm_core.documents.extracted import Refused

    try:
        if kind == "pdf":
            found = pdf_text.extract(data, _grant)
        else:
            found = {"docx": docx_text, "html": html_text}[kind].extract(data)
    except Refused as refused:
        return {"refused": refused.reason, "hint": refused.hint}
    except RecursionError:
        return {"refused": "it is nested too deeply"}
    except MemoryError:
        return {"refused": "reading it needs too much memory"}
    except Exception as error:  # noqa: BLE001 # what libraries raise for damaged files is not told
        said = " ".join([*getattr(error, "__notes__", []), *str(error).split()])
        reason = ascii(said[:200])[1:-1] or type(error).__name__
        return {"refused": f"a damaged {kind.upper()}: {reason}"}
    return {"text": found.text, "remarks": found.remarks}


def main(arguments: list[str]) -> None:
    """See the module's docstring."""
    kind, memory_bytes, cpu_seconds, *directories = arguments
    sys.path[:] = directories
    import json
    import logging
    import resource

    logging.disable()  # libraries tell of what they mend
    _limit(resource.RLIMIT_AS, int(memory_bytes))
    _limit(resource.RLIMIT_CPU, int(cpu_seconds))
    _limit(resource.RLIMIT_CORE, 0)
    try:
        answer = json.dumps(extract(kind, sys.stdin.buffer.read()))
    except MemoryError:
        answer = json.dumps({"refused": "reading it needs too much memory"})
    sys.stdout.write(answer)


def _grant(pages: int) -> None:
    """A second more for each page, where the seconds are limited."""
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_CPU)
    if limit != resource.RLIM_INFINITY:
        _limit(resource.RLIMIT_CPU, limit + pages)


def _limit(kind: int, most: int) -> None:
    import resource

    _, allowed = resource.getrlimit(kind)
    if allowed != resource.RLIM_INFINITY:
        most = min(most, allowed)
    resource.setrlimit(kind, (most, allowed))


if __name__ == "__main__":
    main(sys.argv[1:])
