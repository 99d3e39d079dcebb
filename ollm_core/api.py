"""Open a model: options are checked here, and `loader` builds it."""

from __future__ import annotations

from ollm_core.engine.torch_state import own_torch_state
from ollm_core.generate.causal_lm import StreamedModel
from ollm_core.loader import open_model
from ollm_core.memory.collector import paused_collector
from ollm_core.options import LoadOptions, takes
from ollm_core.plugins.registry import Registry
from ollm_core.values import PathLike


@own_torch_state()
@paused_collector()
@takes(LoadOptions)
def load(path_or_id: PathLike, options: LoadOptions) -> StreamedModel:
    """Open the model in a directory, or one on disk by its id, an alias or its hub repository
    (`owner/name`), for running inside a bounded memory. Nothing is fetched.

    `kv`, `reader` and `draft` also take a name that a plugin offers; "auto" never takes one.

    Raises an OllmError: UnknownModelError, ConfigError, CheckpointError, DeviceError,
    DoesNotFitError, InputError, PluginError.
    """
    registry = options.registry or Registry.discover()
    options.check_names(registry)
    return open_model(path_or_id, options, registry)
