"""What a check is: a test with an id that stays, a reason that a stranger understands, and a place
to look when it fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, NoReturn, TypeVar

import pytest

Level = Literal["core", "gpu", "speed"]
LEVELS: tuple[Level, ...] = ("core", "gpu", "speed")
MARK = "conformance"

Test = TypeVar("Test", bound=Callable[..., object])


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that must hold of every adapter or part."""

    id: str
    """`group.name`; never given to another check."""
    reason: str
    """One sentence: what holds, and so what a user may rely on."""
    look: str
    """Where to look when it fails."""
    since: str
    """The version of ollm-conformance that brought it."""
    level: Level
    needs: tuple[str, ...]
    """Capabilities without which it does not apply."""


def check(
    id: str,
    reason: str,
    *,
    look: str,
    since: str = "0.1",
    level: Level = "core",
    needs: Iterable[str] = (),
) -> Callable[[Test], Test]:
    """Make a test a check. See Check for the words."""
    mark = getattr(pytest.mark, MARK)
    found = Check(id, reason, look, since, level, tuple(needs))

    def decorate(test: Test) -> Test:
        marked: Test = mark(found)(test)
        return marked

    return decorate


def check_of(item: pytest.Item) -> Check | None:
    """The check that a collected test is, if it is one."""
    mark = item.get_closest_marker(MARK)
    return mark.args[0] if mark else None


def does_not_apply(reason: str) -> NoReturn:
    """End a check of something that the model does not have, as experts in a dense one.

    Only for what the adapter's own declarations show. A skip for any other reason is a failure.
    """
    pytest.skip(f"{NOT_APPLICABLE}{reason}")


NOT_APPLICABLE = "does not apply: "
UNSUPPORTED = "unsupported: "
