"""Opens a KV store for a cache: the named tier or plugin, or the first tier with room."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ollm_core.contracts.adapter import ModelAdapter
from ollm_core.contracts.kv import KVGeometry, KVStore
from ollm_core.device.memory import DeviceMemory
from ollm_core.errors import KVStoreError
from ollm_core.files.paths import absolute
from ollm_core.kv.disk.directory import check_parent, default_parent, reap_homes
from ollm_core.kv.disk.prefix_cache import PrefixCachingStore
from ollm_core.kv.recurrent.hybrid import HybridKVStore
from ollm_core.kv.recurrent.no_keys import NoKeysStore
from ollm_core.kv.recurrent.prefix_cache import (
    PrefixCachingHybridStore,
    PrefixCachingLayersStore,
)
from ollm_core.kv.recurrent.snapshots import StateFiles, reap_states
from ollm_core.kv.recurrent.states import state_store
from ollm_core.kv.tiers import TIERS, check_tier
from ollm_core.memory.pair import PerMemory
from ollm_core.plugins.factories import KVRequest
from ollm_core.plugins.registry import Registry, supports

logger = logging.getLogger("ollm")


class StoreOpener:
    """Opens a KV store for each cache of one model."""

    def __init__(
        self,
        kv: str,
        request: KVRequest,
        adapter: ModelAdapter,
        registry: Registry,
        memory: DeviceMemory,
    ) -> None:
        """`kv` and `request` hold where a call does not say otherwise; `memory` is the device's.
        Stores have their own transfers to it: they do not wait behind those of weights. Raises
        InputError for a name that nobody offers, UnsupportedError for a tier that the family cannot
        use.
        """
        self._kv = kv
        self._request = request
        self._adapter = adapter
        self._registry = registry
        self._memory = memory
        registry.check_name("ollm_kv_stores", kv)
        if kv in TIERS:
            check_tier(adapter, kv)

    def __call__(
        self, kv: str, directory: Path | None, num_tokens: int, at_least: int = 0
    ) -> tuple[str, KVStore]:
        """The name of the tier or plugin, and the store. `kv` may be "", `num_tokens` are those to
        expect, of which `at_least` so many will be stored. Raises DoesNotFitError if the disk has
        no room for these.
        """
        name, memory = kv or self._kv, self._memory.beside()
        request = replace(self._request, directory=directory or self._request.directory)
        if offer := self._registry.check_name("ollm_kv_stores", name):
            tier, open_store = offer.name, functools.partial(offer.make, KVStore)
        else:
            tier = name
            if name == "auto":
                limits = PerMemory(request.device_account.limit, request.host_account.limit)
                named = request.directory is not None
                tier = choose_tier(self._adapter, request.geometry, limits, num_tokens, named=named)
            check_tier(self._adapter, tier)
            kept = request.geometry.attention_layers()
            if kept.kinds:
                TIERS[tier].check(replace(request, geometry=kept), at_least)
            open_store = functools.partial(TIERS[tier].open, memory=memory)
        if not request.geometry.is_plain:
            return tier, _hybrid(tier, request, open_store, memory)
        return tier, open_store(request)


def find_directory(kv_dir: str | os.PathLike[str] | None) -> Path | None:
    """`kv_dir`, made absolute. What killed runs left in it, and in the default directory, is
    removed.

    Raises InputError for what is no path, KVStoreError if KV cannot be kept there.
    """
    directory = None if kv_dir is None else absolute(kv_dir)
    if directory is not None:
        check_parent(directory)
    for parent in {directory or default_parent(), default_parent()}:
        reap_homes(parent)
        reap_states(parent)
    return directory


def choose_tier(
    adapter: ModelAdapter,
    geometry: KVGeometry,
    limits: PerMemory[int],
    num_tokens: int,
    *,
    named: bool = False,
) -> str:
    """The first tier that leaves enough room beside the expected tokens; one in files where a
    directory was `named`. `limits` are bytes of device and host.
    """
    able = [tier for tier in TIERS if supports(adapter, f"kv-{tier}")]
    in_files = [tier for tier in able if TIERS[tier].in_files]
    if named and in_files:
        return in_files[0]
    # Windows are not counted: how many rows share the tokens is not known here.
    layer_bytes = sum(map(geometry.block_bytes, range(geometry.num_layers)))
    num_expected = num_tokens + geometry.block_size
    expected = layer_bytes * num_expected // geometry.block_size
    fitting = [tier for tier in able if TIERS[tier].has_room(expected, limits)]
    return (*fitting, *reversed(able), *TIERS)[0]


def _hybrid(
    tier: str,
    request: KVRequest,
    open_store: Callable[[KVRequest], KVStore],
    memory: DeviceMemory,
) -> HybridKVStore:
    """A store of what is asked for, and of recurrent states beside it."""
    geometry = request.geometry
    accounts = PerMemory(request.device_account, request.host_account)
    states = state_store(tier, geometry, accounts, memory)
    kept = geometry.attention_layers()
    attention = open_store(replace(request, geometry=kept)) if kept.kinds else NoKeysStore(geometry)
    if isinstance(attention, PrefixCachingStore) and not states.shapes:
        return PrefixCachingLayersStore(geometry, attention, states)
    if isinstance(attention, PrefixCachingStore) and request.directory is not None:
        try:
            files = StateFiles(request.directory, geometry, request.fingerprint())
        except (OSError, KVStoreError) as error:
            logger.warning("recurrent states are not saved in the prefix cache: %s", error)
        else:
            return PrefixCachingHybridStore(geometry, attention, states, files)
    return HybridKVStore(geometry, attention, states)
