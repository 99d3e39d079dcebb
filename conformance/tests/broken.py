"""What is said of a part that is broken on purpose."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BrokenPart:
    """A part with one fault."""

    name: str
    fault: str
    """One sentence: what it does wrong."""
    suite: type
    """The test class that runs it."""
    check: str
    """The check that is meant to find the fault."""
