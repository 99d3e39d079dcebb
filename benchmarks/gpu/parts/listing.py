"""Which parts there are, in the order in which they are worth their time. Free of torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ollm_core.plugins.registry import Registry


@dataclass(frozen=True, slots=True)
class Part:
    """One part: the function `run` of a module of this package."""

    module: str
    worth: float
    """Its share of the time that is left when it begins, beside those of the parts after it."""
    argument: str = ""
    """What `run` is told to look at."""
    timed: bool = True
    """Whether it measures times, and so must be alone."""

    @property
    def name(self) -> str:
        """As it is told, and asked for with --part."""
        return f"{self.module}-{self.argument}" if self.argument else self.module


def parts() -> list[Part]:
    """First what must hold, side by side, then what is measured, one after the other."""
    adapters = sorted(Registry.discover().adapters)
    return [
        Part("weights", 150, timed=False),
        *(Part("parity", 150, name, timed=False) for name in adapters),
        Part("tests", 150, timed=False),
        *(Part("conformance", 150, name, timed=False) for name in adapters),
        Part("speeds", 25),
        Part("streamed", 80),
        Part("resident", 45),
        Part("long", 120),
        Part("experts", 35, "gpt-oss-20b"),
        Part("experts", 45, "qwen3-next-80b"),
        Part("choices", 40),
        Part("compiled", 20),
    ]


def chosen(wanted: Iterable[str], there: list[Part]) -> list[Part]:
    """Those with one of these names, or of a module of that name. Raises ValueError for one that
    is neither.
    """
    names = list(wanted)
    if not names:
        return there
    for name in names:
        if not any(name in (part.name, part.module) for part in there):
            known = ", ".join(dict.fromkeys(part.module for part in there))
            raise ValueError(f"there is no part {name!r}; there are {known}")
    return [part for part in there if part.name in names or part.module in names]
