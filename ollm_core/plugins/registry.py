"""The registry of installed plugins: finds, checks and looks up; imports no torch.

A plugin is one entry point in the group `ollm.adapters`. Each is loaded in isolation: one that is
broken is kept as failed with its reason, and hurts no other. There is no module-level state.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType
from typing import Literal

from ollm_core.contracts.adapter import ModelAdapter
from ollm_core.contracts.model import CatalogEntry, Config
from ollm_core.errors import InputError, PluginError, UnknownModelError, UnsupportedError, one_line
from ollm_core.files.untrusted_json import show
from ollm_core.plugins.loader import KINDS, Offer, ask
from ollm_core.plugins.unclaimed import why_not_decoder, why_unclaimed
from ollm_core.plugins.validation import CAPABILITIES, check_adapter

ENTRY_POINT_GROUP = "ollm.adapters"
_IMPORTS_TORCH = (
    "imports torch when it is loaded, which slows every `ollm --help`: import it inside functions"
)
LOAD_PLUGINS = "OLLM_LOAD_PLUGINS"
"""Environment variable: the only distributions or entry points to load, comma separated."""


@dataclass(frozen=True, slots=True)
class PluginInfo:
    """One entry point and what became of it."""

    name: str
    distribution: str
    """Empty where the entry point belongs to none."""
    version: str
    adapters: tuple[ModelAdapter, ...] = ()
    """Empty unless `status` is "ok"."""
    offers: tuple[Offer, ...] = ()
    """What else it brings by name; empty unless `status` is "ok"."""
    models: tuple[CatalogEntry, ...] = ()
    """What it says of models by `ollm_catalog`; empty unless `status` is "ok"."""
    status: Literal["ok", "failed", "skipped"] = "ok"
    reason: str = ""
    """Why it failed or was skipped; a warning if it is "ok"."""

    def __str__(self) -> str:
        origin = f"{self.distribution} {self.version}".strip()
        return f"{self.name} ({origin})" if origin else self.name


class Registry:
    """The plugins of one moment. Build it with `discover`."""

    def __init__(self) -> None:
        self._plugins: list[PluginInfo] = []
        self._adapters: dict[str, ModelAdapter] = {}
        self._catalog: list[tuple[ModelAdapter | None, CatalogEntry, PluginInfo]] = []
        self._names: dict[str, tuple[ModelAdapter | None, CatalogEntry]] = {}
        self._offers: dict[tuple[str, str], Offer] = {}
        self.proven: set[str] = set()
        """What was found true of the adapters' layouts, and need not be looked at again."""
        self._claims: dict[tuple[str, str], PluginInfo | str] = {
            (kind.title, name): "oLLM itself" for kind in KINDS.values() for name in kind.built_in
        }

    @classmethod
    def discover(cls, candidates: Iterable[EntryPoint] | None = None) -> Registry:
        """Load the `candidates` (default: those installed) that `OLLM_LOAD_PLUGINS` lets through.

        Never raises for a broken plugin. Of two that clash, the first by distribution wins.
        """
        if candidates is None:
            candidates = entry_points(group=ENTRY_POINT_GROUP)
        found = [(_info(entry_point), entry_point) for entry_point in candidates]
        found.sort(key=lambda pair: (pair[0].distribution, pair[0].name))
        wanted = _wanted(os.environ.get(LOAD_PLUGINS))
        registry = cls()
        for info, entry_point in found:
            names = {_normalised(info.name), _normalised(info.distribution)}
            if wanted is None or names & wanted:
                registry._load(info, entry_point)
            else:
                reason = f"not named in {LOAD_PLUGINS}"
                registry._plugins.append(replace(info, status="skipped", reason=reason))
        known = {_normalised(name) for info, _ in found for name in (info.name, info.distribution)}
        for name in sorted((wanted or set()) - known):
            reason = f"named in {LOAD_PLUGINS}, but not installed"
            registry._plugins.append(PluginInfo(name, "", "", status="failed", reason=reason))
        registry._name_models()
        return registry

    @classmethod
    def of(cls, *adapters: ModelAdapter) -> Registry:
        """A registry of these adapters alone, for tests. Raises PluginError for one that cannot be
        used.
        """
        registry = cls()
        registry._take(PluginInfo("given", "", "", adapters=adapters))
        registry._name_models()
        return registry

    @property
    def plugins(self) -> Sequence[PluginInfo]:
        """Every entry point found, the failed and skipped ones included."""
        return tuple(self._plugins)

    @property
    def adapters(self) -> Mapping[str, ModelAdapter]:
        """The usable adapters by name."""
        return MappingProxyType(self._adapters)

    def adapter_for(self, config: Config) -> ModelAdapter:
        """The adapter that opens a config.json, as it answers for this model. Raises
        UnknownModelError, with the reason, if there is none.
        """
        adapter = self.claimant(config)
        if adapter and config["model_type"] in adapter.model_types:
            return adapter.for_model(config)
        if adapter and why_not_decoder(config) is None:
            return adapter.for_model(config)
        reason, hint = why_unclaimed(config)
        raise UnknownModelError(f"{reason}{self._failures()}", hint=hint)

    def check_opens(self, config: Config, where: str) -> None:
        """Raises UnknownModelError for a config.json that no adapter claims, UnsupportedError for
        one whose adapter does not open its quantised form; `where` it is, is for messages.
        """
        check_quantization(self.adapter_for(config), config, where)

    def claimant(self, config: Config) -> ModelAdapter | None:
        """The adapter that claims the model of a config.json, if one does: one that names its
        `model_type`, else the first that claims the rest. Imports nothing, so the latter may not
        open it.
        """
        model_type = config.get("model_type")
        if not isinstance(model_type, str):
            return None
        adapters = self._adapters.values()
        named = (one for one in adapters if model_type in one.model_types)
        return next(named, None) or next((one for one in adapters if one.claims_rest), None)

    def find(self, name: str) -> tuple[ModelAdapter | None, CatalogEntry]:
        """The model of this id, alias or hub repository, in any case, and the adapter that claims
        it. Raises UnknownModelError, naming similar ones.
        """
        if match := self.named(name):
            return match
        spoken = _spoken(name)
        longer = [key for key in self._names if ":" in key and spoken.startswith(f"{key}-")]
        close = difflib.get_close_matches(spoken, self._names, n=6, cutoff=0.6)
        shown: dict[str, str] = {}  # the name that is nearest, by model
        for key in [*sorted(longer, key=len, reverse=True), *close]:
            if "/" not in key:
                shown.setdefault(self._names[key][1].id, key)
        names = " or ".join(self._written(key) for key in list(shown.values())[:3])
        raise UnknownModelError(
            f"there is no model {name!a}{self._failures()}",
            hint=f"did you mean {names}?" if names else "`ollm list-models` shows the known ones",
        )

    def _written(self, key: str) -> str:
        """A name as its model has it, by that which it is looked up by."""
        entry = self._names[key][1]
        return next((one for one in (entry.id, *entry.aliases) if one.casefold() == key), key)

    def named(self, name: str) -> tuple[ModelAdapter | None, CatalogEntry] | None:
        """As `find`, or None."""
        return self._names.get(_spoken(name))

    def catalog(self) -> list[tuple[ModelAdapter | None, CatalogEntry, PluginInfo]]:
        """Every model that can be named, with the adapter that claims it and the plugin that
        brought it.
        """
        return list(self._catalog)

    def offers(self, hook: str) -> Mapping[str, Offer]:
        """What plugins offer through `hook`, by name; `hook` is a key of `KINDS`."""
        return {name: offer for (of, name), offer in self._offers.items() if of == hook}

    def check_name(self, hook: str, name: str) -> Offer | None:
        """What a plugin offers under `name`, or None where `name` is built in.

        Raises InputError, naming what there is, for a name that is neither.
        """
        kind, offers = KINDS[hook], self.offers(hook)
        if not isinstance(name, str) or (name not in kind.built_in and name not in offers):
            raise InputError(
                f"there is no {kind.title} {name!a}{self._failures()}",
                hint=f"one of: {', '.join((*kind.built_in, *offers))}",
            )
        return offers.get(name)

    def _failures(self) -> str:
        failed = [plugin for plugin in self._plugins if plugin.status == "failed"]
        return "".join(f"; plugin {plugin} failed to load: {plugin.reason}" for plugin in failed)

    def _load(self, info: PluginInfo, entry_point: EntryPoint) -> None:
        """Take a plugin in whole, or record why not. One that brings torch in is warned of; where
        torch was there already, nothing is known.
        """
        had_torch = "torch" in sys.modules
        try:
            brought = ask(entry_point, str(info))
            slow = not had_torch and "torch" in sys.modules
            taken = replace(
                info, adapters=brought.adapters, offers=brought.offers, models=brought.models
            )
            self._take(replace(taken, reason=_IMPORTS_TORCH if slow else ""))
        except (Exception, SystemExit) as error:  # noqa: BLE001 (a plugin may raise anything)
            self._plugins.append(replace(info, status="failed", reason=one_line(error)))

    def _take(self, info: PluginInfo) -> None:
        """Add what a plugin brings. Raises PluginError, with nothing added, where it clashes."""
        checked = [(adapter, *check_adapter(adapter)) for adapter in info.adapters]
        catalogs = [(adapter, models) for adapter, models, _ in checked]
        warnings = [info.reason, *(warning for _, _, warning in checked)]
        info = replace(info, reason="; ".join(filter(None, warnings)))
        claims: dict[tuple[str, str], PluginInfo] = {}
        wanted = [c for adapter, models in catalogs for c in _claims(adapter, models)]
        wanted += [(KINDS[offer.hook].title, offer.name) for offer in info.offers]
        for claim in wanted:
            if owner := self._claims.get(claim) or claims.get(claim):
                raise PluginError(f"{claim[0]} {claim[1]!r} is already taken by {owner}")
            claims[claim] = info
        self._plugins.append(info)
        self._claims.update(claims)
        self._adapters.update({adapter.name: adapter for adapter in info.adapters})
        self._offers.update({(offer.hook, offer.name): offer for offer in info.offers})
        self._catalog.extend(
            (adapter, model, info) for adapter, models in catalogs for model in models
        )

    def _name_models(self) -> None:
        """Every model under its names. An adapter's own come first: of those that plugins say by
        `ollm_catalog`, one whose id or repository is taken is left out, and its names are those of
        the model that has it. Else a name is that of the first model which has it.
        """
        own = [(adapter, entry) for adapter, entry, _ in self._catalog]
        for adapter, entry in own:
            self._names[entry.id.casefold()] = adapter, entry
        for adapter, entry in own:
            for name in (*entry.aliases, entry.repo):
                self._names.setdefault(name.casefold(), (adapter, entry))
        for plugin in self._plugins:
            for entry in plugin.models:
                keys = [name.casefold() for name in (entry.id, entry.repo, *entry.aliases)]
                found = self._names.get(keys[0]) or self._names.get(keys[1])
                if found is None:
                    found = self.claimant(entry.config), entry
                    self._catalog.append((*found, plugin))
                for key in keys:
                    self._names.setdefault(key, found)


def supports(adapter: ModelAdapter, capability: str) -> bool:
    """Whether `adapter` declares `capability` in full, or not at all."""
    declared = adapter.capabilities.get(capability)
    return declared is None or declared.support == "full"


def limits(adapter: ModelAdapter) -> dict[str, str]:
    """Each capability that `adapter` does not have in full, with its reason."""
    declared = sorted(adapter.capabilities.items())
    return {name: limit.reason for name, limit in declared if not supports(adapter, name)}


def check_quantization(adapter: ModelAdapter, config: Config, where: str) -> None:
    """Raises UnsupportedError for a model that is quantised in a way that the adapter does not
    declare: its tensors would be taken for plain ones. `where` the config is, is for the message.
    """
    stated = config.get("quantization_config")
    if stated is None:
        return
    method = stated.get("quant_method") if isinstance(stated, Mapping) else stated
    if method not in adapter.quantizations:
        known = ", ".join(adapter.quantizations)
        raise UnsupportedError(
            f"{where}: quantization_config of config.json: quant_method {show(method)} is not "
            f"supported by adapter {adapter.name}",
            hint=f"it opens {known}, and models that are not quantised"
            if known
            else "open the model as it was before it was quantised",
        )


def require(adapter: ModelAdapter, capability: str) -> None:
    """Raises UnsupportedError, with the adapter's own reason, unless `capability` is full."""
    if capability not in CAPABILITIES:
        raise ValueError(f"unknown capability {capability!r}, known: {', '.join(CAPABILITIES)}")
    if not supports(adapter, capability):
        declared = adapter.capabilities[capability]
        yet = " yet" if declared.support == "not-implemented" else ""
        raise UnsupportedError(
            f"adapter {adapter.name} does not support {capability}{yet}: {declared.reason}",
            hint=f"do without it; it means {CAPABILITIES[capability]}",
        )


def _claims(adapter: ModelAdapter, models: Iterable[CatalogEntry]) -> Iterator[tuple[str, str]]:
    """What only one adapter may have."""
    yield "adapter name", adapter.name
    for model_type in adapter.model_types:
        yield "model_type", model_type
    for model in models:
        yield "model id", model.id.casefold()


def _spoken(name: str) -> str:
    """A model's name as it is looked up: in any case, `:latest` as good as nothing."""
    return name.casefold().removesuffix(":latest")


def _info(entry_point: EntryPoint) -> PluginInfo:
    distribution = version = ""
    if entry_point.dist is not None:
        try:
            distribution, version = entry_point.dist.name or "", entry_point.dist.version or ""
        except Exception:  # noqa: BLE001 (damaged metadata makes importlib raise anything)
            distribution = version = "unknown"
    return PluginInfo(entry_point.name, distribution, version)


def _wanted(setting: str | None) -> set[str] | None:
    if setting is None:
        return None
    return {_normalised(name) for name in setting.split(",")} - {""}


def _normalised(name: str) -> str:
    """A distribution's name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()
