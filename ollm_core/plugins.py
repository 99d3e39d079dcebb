"""What one plugin brings: its hooks are asked, and what they return is checked.

Knows one plugin at a time; who may have which name is for the registry to say.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from types import MappingProxyType
from typing import Any

import pluggy

from ollm_core import hookspecs
from ollm_core.errors import OllmError, PluginError
from ollm_core.interfaces import ModelAdapter


@dataclass(frozen=True, slots=True)
class Kind:
    """What one hook offers by name."""

    title: str
    """In messages, for instance "KV store"."""
    field: str
    """In JSON, for instance "kv_stores"."""
    built_in: tuple[str, ...] = ()
    """Names that belong to oLLM itself."""


KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "ollm_kv_stores": Kind("KV store", "kv_stores", ("auto", "device", "host", "disk")),
        "ollm_reading_engines": Kind(
            "reading engine", "reading_engines", ("auto", "direct", "mmap", "kvikio")
        ),
        "ollm_weight_codecs": Kind("weight codec", "weight_codecs", ("compressed",)),
        "ollm_draft_sources": Kind("draft source", "draft_sources", ("none", "lookup", "model")),
        "ollm_commands": Kind(
            "command",
            "commands",
            (
                "ask", "batch", "bench", "cache", "chat", "convert", "doctor", "help", "import",
                "list-models", "plan", "plugins", "pull", "run", "serve",
            ),
        ),
    }
)  # fmt: skip
"""By hook. `ollm_adapters` is apart: adapters are objects that bring their own names."""

_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")


@dataclass(frozen=True, slots=True)
class Offer:
    """One thing that a plugin offers by name, not made yet."""

    hook: str
    name: str
    factory: Callable[..., Any]
    plugin: str
    """Who offers it, for messages."""

    def __str__(self) -> str:
        return f"{KINDS[self.hook].title} {self.name!r} of {self.plugin}"

    def make(self, expected: type[object], *arguments: object) -> Any:
        """What the factory makes of `arguments`, an `expected`.

        Raises PluginError if that is no `expected`, or for anything that the factory raises and
        that is no OllmError.
        """
        try:
            made = self.factory(*arguments)
        except OllmError:
            raise
        except (Exception, SystemExit) as error:
            raise PluginError(f"{self} cannot be used: {one_line(error)}") from error
        if not isinstance(made, expected):
            raise PluginError(
                f"{self} is a {type(made).__name__}, expected a {expected.__name__}",
                hint="its factory must return one; see docs/plugins.md",
            )
        return made


def ask(entry_point: EntryPoint, plugin: str) -> tuple[list[ModelAdapter], list[Offer]]:
    """Import a plugin and call its hooks, in a plugin manager of its own so that no other is
    touched.

    Raises PluginError for a plugin that cannot be used, and whatever the plugin raises.
    """
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    manager.register(entry_point.load(), entry_point.name)
    manager.check_pending()
    hooks = ("ollm_adapters", *KINDS)
    calls = {hook: getattr(manager.hook, hook) for hook in hooks}
    if not any(call.get_hookimpls() for call in calls.values()):
        raise PluginError(f"implements no hook; there are {', '.join(hooks)}")
    adapters = [one for offered in calls["ollm_adapters"]() for one in offered]
    for adapter in adapters:
        if not isinstance(adapter, ModelAdapter):
            raise PluginError(f"offers {adapter!r}, which is no ModelAdapter")
    offers = [
        offer for hook in KINDS for offered in calls[hook]() for offer in _offers(hook, offered)
    ]
    return adapters, [Offer(hook, name, factory, plugin) for hook, name, factory in offers]


def _offers(hook: str, offered: object) -> Iterator[tuple[str, str, Callable[..., Any]]]:
    """Hook, name and factory of each thing offered. Raises PluginError for anything else."""
    if not isinstance(offered, Mapping):
        raise PluginError(f"{hook} must return names and factories, got {type(offered).__name__}")
    for name, factory in offered.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise PluginError(
                f"{hook}: {KINDS[hook].title} name {name!a} must be of a-z, 0-9 and '-'"
            )
        if not callable(factory):
            raise PluginError(f"{hook}: {name!r} is a {type(factory).__name__}, no factory")
        yield hook, name, factory


def one_line(error: BaseException) -> str:
    """An error in one line, with its type unless it speaks for itself."""
    text = " ".join(str(error).split())
    return text if isinstance(error, OllmError) else f"{type(error).__name__}: {text}".strip(": ")
