"""Loads one plugin: calls its hooks, and checks what they return.

Knows one plugin at a time; who may have which name is for the registry to say.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from types import MappingProxyType
from typing import Any

import pluggy

from ollm_core.contracts.adapter import ModelAdapter
from ollm_core.contracts.kv import KV_TIERS
from ollm_core.contracts.model import CatalogEntry
from ollm_core.errors import OllmError, PluginError, one_line
from ollm_core.plugins import hookspecs
from ollm_core.plugins.validation import check_entries, told


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
        "ollm_kv_stores": Kind("KV store", "kv_stores", ("auto", *KV_TIERS)),
        "ollm_reading_engines": Kind(
            "reading engine", "reading_engines", ("auto", "direct", "mmap", "kvikio")
        ),
        "ollm_weight_codecs": Kind("weight codec", "weight_codecs", ("compressed", "mxfp4")),
        "ollm_draft_sources": Kind("draft source", "draft_sources", ("none", "lookup", "model")),
        "ollm_commands": Kind(
            "command",
            "commands",
            (
                "ask", "batch", "bench", "cache", "chat", "completion", "config", "convert",
                "decide", "doctor", "help", "import", "list-models", "plan", "plugins", "pull",
                "run", "serve",
            ),
        ),
    }
)  # fmt: skip
"""By hook. `ollm_adapters` and `ollm_catalog` are apart: adapters and models are objects that bring
their own names.
"""

_HOOKS = ("ollm_adapters", "ollm_catalog", *KINDS)
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


@dataclass(frozen=True, slots=True)
class Brought:
    """All that one plugin brings."""

    adapters: tuple[ModelAdapter, ...]
    offers: tuple[Offer, ...]
    models: tuple[CatalogEntry, ...]
    """Of `ollm_catalog`; an adapter's own are not here."""


def ask(entry_point: EntryPoint, plugin: str) -> Brought:
    """Import a plugin and call its hooks, in a plugin manager of its own so that no other is
    touched.

    Raises PluginError for a plugin that cannot be used, and whatever the plugin raises.
    """
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    module = entry_point.load()
    manager.register(module, entry_point.name)
    _check_hooks(manager, module)
    manager.check_pending()
    offers = [
        offer
        for hook in KINDS
        for offered in _called(manager, hook)
        for offer in _offers(hook, offered)
    ]
    return Brought(
        tuple(one for offered in _called(manager, "ollm_adapters") for one in _adapters(offered)),
        tuple(Offer(hook, name, factory, plugin) for hook, name, factory in offers),
        tuple(
            one
            for offered in _called(manager, "ollm_catalog")
            for one in check_entries("ollm_catalog()", offered)
        ),
    )


def _check_hooks(manager: pluggy.PluginManager, module: object) -> None:
    """Raises PluginError for a hook that is not there, with the one that may be meant, and for a
    module that implements none.
    """
    callers = manager.get_hookcallers(module) or []
    for caller in callers:
        if not caller.has_spec() and not all(one.optionalhook for one in caller.get_hookimpls()):
            close = difflib.get_close_matches(caller.name, _HOOKS, n=1)
            raise PluginError(
                f"unknown hook {caller.name!r}",
                hint=f"did you mean {close[0]}?" if close else f"there are {', '.join(_HOOKS)}",
            )
    if not callers:
        unmarked = [hook for hook in _HOOKS if callable(getattr(module, hook, None))]
        raise PluginError(
            f"implements no hook; there are {', '.join(_HOOKS)}",
            hint=f"write @hookimpl of ollm_core above {unmarked[0]}" if unmarked else "",
        )


def _called(manager: pluggy.PluginManager, hook: str) -> list[object]:
    """What the plugin's hook returns, in a list; empty where it has none. Raises PluginError for
    what it raises, and for None.
    """
    call = getattr(manager.hook, hook)
    if not call.get_hookimpls():
        return []
    try:
        found: list[object] = call()
    except OllmError:
        raise
    except (Exception, SystemExit) as error:
        abstract = isinstance(error, TypeError) and "abstract class" in str(error)
        raise PluginError(
            f"{hook}() raised {one_line(error)}",
            hint="write what the class still lacks" if abstract else "",
        ) from error
    if not found:  # pluggy leaves None out
        raise PluginError(f"{hook}() returned None", hint="it must return what it offers")
    return found


def _adapters(offered: object) -> Iterator[ModelAdapter]:
    """Each adapter offered. Raises PluginError for anything else."""
    if not isinstance(offered, Iterable):
        fix = "(adapter,)" if isinstance(offered, ModelAdapter) else "(XAdapter(),)"
        raise PluginError(
            f"ollm_adapters() must return adapters, got {told(offered)}",
            hint=f"return them in a tuple, of one too: {fix}",
        )
    for adapter in offered:
        if not isinstance(adapter, ModelAdapter):
            fix = "an adapter is a subclass of DecoderAdapter or ModelAdapter"
            if isinstance(adapter, type) and issubclass(adapter, ModelAdapter):
                fix = f"offer an object of the class: {adapter.__name__}()"
            raise PluginError(
                f"ollm_adapters() offers {told(adapter)}, which is no ModelAdapter", hint=fix
            )
        yield adapter


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
