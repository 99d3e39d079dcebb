"""Open a model: the only place that wires the parts together."""

from __future__ import annotations

import collections.abc
from contextlib import ExitStack, nullcontext
from dataclasses import replace

import torch

from ollm_core.attention.trial import require_flash
from ollm_core.checkpoint.hub import resolve
from ollm_core.contracts.drafting import Drafter
from ollm_core.device.select import pick_device
from ollm_core.device.transfer import bus_of
from ollm_core.drafting.draft_model import open_drafter
from ollm_core.drafting.lookup import LookupDrafter
from ollm_core.engine.pass_planner import Accounts
from ollm_core.engine.torch_state import own_torch_state
from ollm_core.generate.causal_lm import StreamedModel
from ollm_core.kv.factory import find_directory
from ollm_core.loader import Opening
from ollm_core.memory.accounts import MemoryAccount
from ollm_core.memory.budgets import layer_limits, stated_budgets
from ollm_core.memory.cuda_limit import AllocatorCap
from ollm_core.options import LoadOptions, takes
from ollm_core.plugins.factories import DraftRequest
from ollm_core.plugins.registry import Registry, require
from ollm_core.profiling import no_span
from ollm_core.values import PathLike, Size, dtype_name, whole_number


@own_torch_state()
@takes(LoadOptions)
def load(path_or_id: PathLike, options: LoadOptions) -> StreamedModel:
    """Open the model in a directory, or one that is known by id, for running inside a bounded
    memory.

    `kv`, `reader` and `draft` also take a name that a plugin offers; "auto" never takes one.

    Raises an OllmError: UnknownModelError, ConfigError, CheckpointError, DeviceError,
    DoesNotFitError, InputError, PluginError.
    """
    registry = options.registry or Registry.discover()
    options.check_names(registry)
    draft_source = registry.check_name("ollm_draft_sources", options.draft)
    chunk = whole_number(options.chunk_size)
    target = pick_device(options.device)
    layers = layer_limits(target, options.device_layers, options.host_layers)
    accounts = _accounts(target, options.device_memory, options.host_memory)
    cap = AllocatorCap(accounts.device, target) if target.type == "cuda" else nullcontext
    kv_directory = find_directory(options.kv_dir)
    opening = Opening(
        registry,
        options.reader,
        dtype_name(options.dtype),
        target,
        cap,
        bus_of(target),
        options.trust_remote_code,
    )
    profile, attention = options.profile, options.attention
    parts = opening.take_apart(resolve(path_or_id, registry, options.models_dir))
    for capability, wanted in (
        ("drafts", options.draft != "none"),
        ("blockwise-attention", attention not in ("auto", "exact")),
        ("chunked-prefill", chunk is not None),
    ):
        if wanted:
            require(parts.adapter, capability)
    if attention == "flash":
        require_flash(target, parts.dtype, here=True)
    with ExitStack() as opened:  # what fails from here on leaves nothing open
        source = opened.enter_context(opening.source(parts))
        model = opened.enter_context(
            opening.open(
                parts,
                profile.reading(source) if profile else source,
                accounts,
                lambda weights: parts.admission(
                    accounts,
                    weights,
                    parts.workspace(),
                    attention=attention,
                    chunk_size=chunk,
                    pressure=opening.pressure(weights),
                ),
                options.kv,
                kv_directory,
                options.keep_kv,
                options.on_progress,
                profile.span if profile else no_span,
            )
        )
        model.weights.held.layer_limits = layers
        drafter: Drafter | None = None
        if options.draft_model is not None:
            directory = resolve(options.draft_model, registry, options.models_dir)
            no_code = replace(opening, trust_remote_code=False)  # it was said of the model
            drafter = open_drafter(no_code, model, directory)
        elif options.draft == "lookup":
            drafter = LookupDrafter()
        elif draft_source is not None:
            request = DraftRequest(
                parts.config,
                parts.checkpoint.directory,
                parts.skeleton.config.vocab_size,
                model.tokenizer,
                str(target),
                accounts.device,
                accounts.host,
            )
            # A Drafter is anything that can be called, which is what the answer is held against.
            drafter = draft_source.make(collections.abc.Callable, request)  # type: ignore[arg-type]
        model.draft_with(drafter, whole_number(options.num_draft_tokens))
        opened.pop_all()
    return model


def _accounts(
    device: torch.device, device_memory: Size | None, host_memory: Size | None
) -> Accounts:
    budgets = stated_budgets(device, device_memory, host_memory)
    return Accounts(
        MemoryAccount("device memory", budgets.device), MemoryAccount("host memory", budgets.host)
    )
