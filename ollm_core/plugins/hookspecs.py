"""The hooks that a plugin may implement. docs/plugins.md has an example of each.

One entry point in the group `ollm.adapters` names the plugin module. Hooks are called once, when
plugins are looked for, and must not import torch: what they offer is named here and made later.
A name is of a-z, 0-9 and "-", and belongs to one plugin.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from ollm_core.contracts.adapter import ModelAdapter
    from ollm_core.contracts.model import CatalogEntry
    from ollm_core.plugins.factories import (
        CommandFactory,
        DraftSourceFactory,
        KVStoreFactory,
        ReadingEngineFactory,
        WeightCodec,
    )

PROJECT = "ollm"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def ollm_adapters() -> Sequence[ModelAdapter]:
    """Model adapters that this plugin offers. Called once; must not import torch."""
    return ()


@hookspec
def ollm_catalog() -> Sequence[CatalogEntry]:
    """Models that can be named by id, of any family: whichever adapter claims the `model_type` of
    an entry opens it. An id or alias that an adapter's own catalog has is that adapter's.
    """
    return ()


@hookspec
def ollm_kv_stores() -> Mapping[str, KVStoreFactory]:
    """KV stores by the name that `kv` takes. A factory gets a KVRequest and returns a KVStore."""
    return {}


@hookspec
def ollm_reading_engines() -> Mapping[str, ReadingEngineFactory]:
    """Reading engines by the name that `reader` takes. A factory gets the checkpoint's files and
    returns a ByteSource; where the machine cannot run it, it raises.
    """
    return {}


@hookspec
def ollm_weight_codecs() -> Mapping[str, WeightCodec]:
    """Weight codecs by name. Each is asked about every checkpoint that is opened: it gets a
    CodecRequest and returns, by logical name, the tensors that it decodes, none for a checkpoint
    that is not its own.
    """
    return {}


@hookspec
def ollm_draft_sources() -> Mapping[str, DraftSourceFactory]:
    """Draft sources by the name that `draft` takes. A factory gets a DraftRequest and returns a
    Drafter.
    """
    return {}


@hookspec
def ollm_commands() -> Mapping[str, CommandFactory]:
    """Verbs of the command line by name. A factory takes nothing and returns a click command."""
    return {}
