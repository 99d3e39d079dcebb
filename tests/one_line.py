"""What an error of the command line looks like."""

from __future__ import annotations


def is_one_line_error(stderr: str) -> bool:
    """An `error:`, and at most a `hint:`."""
    lines = stderr.splitlines()
    return (
        1 <= len(lines) <= 2
        and lines[0].startswith("error: ")
        and all(line.startswith("hint: ") for line in lines[1:])
    )
