"""What went wrong in a failed check, and whose code it was raised in: one line each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import FrameType

_NOBODYS = frozenset({"abc", "builtins", "collections", "ollm_conformance", "ollm_core", "typing"})


def what_is_wrong(error: BaseException | None) -> str:
    """The first line of what a check says, or the error in its place."""
    if isinstance(error, AssertionError):
        return str(error).splitlines()[0] if str(error) else "see the assertion above"
    text = " ".join(str(error).split())
    return f"expected no error, got {type(error).__name__}: {text}".removesuffix(": ")


def packages_of(made: object) -> frozenset[str]:
    """Top-level packages of the author's classes that an object, or a class, is made of."""
    cls = made if isinstance(made, type) else type(made)
    return frozenset(base.__module__.partition(".")[0] for base in cls.__mro__) - _NOBODYS


def raised_at(error: BaseException | None, packages: frozenset[str], root: Path) -> str:
    """File, line and function in which an error was raised: the innermost of the author's
    `packages`; without one, that of core. Empty for an assertion, which speaks for itself.

    Files below `root` are named from there, others from their package.
    """
    chain = list(_causes(error))
    if not chain or isinstance(chain[-1], AssertionError):
        return ""
    frames = [pair for one in chain for pair in _frames(one)]
    for owners in (packages, frozenset({"ollm_core"})):
        for frame, line in reversed(frames):
            if _package(frame) in owners:
                return f"{_place(frame, root)}:{line}, in {frame.f_code.co_name}"
    return ""


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it was raised from, the first cause last."""
    while error is not None:
        yield error
        error = error.__cause__


def _frames(error: BaseException) -> Iterator[tuple[FrameType, int]]:
    traceback = error.__traceback__
    while traceback is not None:
        yield traceback.tb_frame, traceback.tb_lineno
        traceback = traceback.tb_next


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


def _place(frame: FrameType, root: Path) -> str:
    path = Path(frame.f_code.co_filename)
    if path.is_relative_to(root):
        return str(path.relative_to(root))
    parts, package = path.parts, _package(frame)
    return "/".join(parts[parts.index(package) :]) if package in parts else path.name
