"""What tests of adapters and of other parts need of the core, in one place that stays: checkpoints
and declarations, models that are run, faults, and what is held and planned.

`ollm_conformance` imports nothing else of the core but `ollm_core` itself, and a test of your own
need not either. Importing this imports torch; `import ollm_core` does not import it.
"""

from __future__ import annotations

from ollm_core.checkpoint.safetensors import Checkpoint, open_checkpoint, read_config
from ollm_core.checkpoint.synthetic import STORED_DTYPES
from ollm_core.contracts.adapter import ADAPTER_API
from ollm_core.contracts.attention import Attention, KVView
from ollm_core.contracts.closing import Closing
from ollm_core.contracts.kv import KeepsStates
from ollm_core.contracts.progress import Progress
from ollm_core.contracts.tensors import DTYPE_BYTES
from ollm_core.contracts.weights import WeightStreamer
from ollm_core.device.buffers import PAGE, aligned_buffer, as_memoryview
from ollm_core.engine.batch import NewTokens
from ollm_core.errors import NotFiniteError, PluginError
from ollm_core.files.untrusted_json import parse_object
from ollm_core.generate.cache import SequenceCache
from ollm_core.generate.causal_lm import StreamedModel
from ollm_core.model.outside_layers import remembering_outside
from ollm_core.model.skeleton import check_paths
from ollm_core.planning.dry_run import DryRun
from ollm_core.plugins.registry import Registry, supports
from ollm_core.plugins.validation import check_capability, told
from ollm_core.products.select import without_instructions
from ollm_core.profiling import Profile
from ollm_core.serving.offline import Answered
from ollm_core.serving.request import (
    Choices,
    Finished,
    NewToken,
    Request,
    SamplingParams,
    Score,
)
from ollm_core.serving.scheduler import Scheduler
from ollm_core.testing.attention import AttendedToken, attended_tokens
from ollm_core.testing.declarations import (
    as_opened,
    check_declarations,
    check_halves,
    check_model,
    described_tensors,
    logical_tensors,
)
from ollm_core.testing.memory import PlannedRun, TierTracker, open_dry_run, plan_run
from ollm_core.testing.reads import counted_reads, failing_reads
from ollm_core.testing.runs import (
    bound_parameters,
    hold_weights,
    limit_running,
    run_pass,
    save_each_layer,
    share_traces,
    weight_tensors,
)
from ollm_core.weights.formats.codecs import LogicalTensors
from ollm_core.weights.units import Parameter, Units, WeightUnit

__all__ = [
    "ADAPTER_API",
    "DTYPE_BYTES",
    "PAGE",
    "STORED_DTYPES",
    "Answered",
    "AttendedToken",
    "Attention",
    "Checkpoint",
    "Choices",
    "Closing",
    "DryRun",
    "Finished",
    "KVView",
    "KeepsStates",
    "LogicalTensors",
    "NewToken",
    "NewTokens",
    "NotFiniteError",
    "Parameter",
    "PlannedRun",
    "PluginError",
    "Profile",
    "Progress",
    "Registry",
    "Request",
    "SamplingParams",
    "Scheduler",
    "Score",
    "SequenceCache",
    "StreamedModel",
    "TierTracker",
    "Units",
    "WeightStreamer",
    "WeightUnit",
    "aligned_buffer",
    "as_memoryview",
    "as_opened",
    "attended_tokens",
    "bound_parameters",
    "check_capability",
    "check_declarations",
    "check_halves",
    "check_model",
    "check_paths",
    "counted_reads",
    "described_tensors",
    "failing_reads",
    "hold_weights",
    "limit_running",
    "logical_tensors",
    "open_checkpoint",
    "open_dry_run",
    "parse_object",
    "plan_run",
    "read_config",
    "remembering_outside",
    "run_pass",
    "save_each_layer",
    "share_traces",
    "supports",
    "told",
    "weight_tensors",
    "without_instructions",
]
