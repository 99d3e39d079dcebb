"""Plain data that the parts exchange: frozen, slotted, and free of torch so that `list-models`
stays quick.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ollm_core.errors import PluginError

if TYPE_CHECKING:
    from torch import Tensor, nn

Config = Mapping[str, Any]
"""A model's config.json as parsed: the one form that every declaration reads."""

Tier = Literal["device", "host", "disk"]
Support = Literal["full", "unsupported", "not-implemented"]

DTYPE_BYTES: Mapping[str, int] = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""Bytes per element of the safetensors dtypes that a checkpoint may hold."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor's bytes are: `num_bytes` at absolute file `offset` in `path`, row-major,
    little-endian.
    """

    name: str
    dtype: str
    """safetensors dtype name, a key of `DTYPE_BYTES`."""
    shape: tuple[int, ...]
    path: Path
    offset: int
    num_bytes: int

    def rows(self, start: int, stop: int) -> TensorInfo:
        """The part of this tensor that is rows `start` to `stop` of its first dimension."""
        row_bytes = self.num_bytes // self.shape[0]
        return TensorInfo(
            f"{self.name}[{start}:{stop}]", self.dtype, (stop - start, *self.shape[1:]), self.path,
            self.offset + start * row_bytes, (stop - start) * row_bytes,
        )  # fmt: skip

    def row(self, index: int) -> TensorInfo:
        """Row `index` of the first dimension, without that dimension."""
        row = self.rows(index, index + 1)
        return replace(row, name=f"{self.name}[{index}]", shape=self.shape[1:])


@dataclass(frozen=True, slots=True)
class EncodedTensor:
    """A tensor that a weight codec makes of others, which a checkpoint stores in its place."""

    tensors: tuple[str, ...]
    """Names of the stored tensors, in the order in which `decode` takes them."""
    dtype: str
    """safetensors dtype name of what `decode` returns, a key of `DTYPE_BYTES`."""
    shape: tuple[int, ...]
    decode: Callable[..., Tensor]
    """The stored tensors as read, on the device that computes -> a new tensor of `dtype` and
    `shape` there, bit for bit what was encoded. Called in each weight pass.
    """
    scratch_bytes: int = 0
    """The most that `decode` holds beside its arguments and its result."""
    cpu_only: bool = False
    """Whether `decode` takes and makes tensors on the CPU only: another device is refused."""
    decode_seconds: float = 0.0
    """About how long `decode` takes, for plans; what is quick need not say."""


@dataclass(frozen=True, slots=True)
class StoredForm:
    """What a transform expects of one stored tensor, or of the row of it that it is given."""

    dtype: str
    """safetensors dtype name, a key of `DTYPE_BYTES`."""
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ParameterSource:
    """Which checkpoint tensors make one parameter.

    `transform` gets the tensors in order, as stored, and returns the parameter; None takes the
    single tensor as it is.
    """

    tensors: tuple[str, ...]
    transform: Callable[..., Tensor] | None = None
    scratch_bytes: int = 0
    """The most that `transform` holds beside its arguments and the finished parameter."""
    row: int | None = None
    """Only this row of each tensor's first dimension; the other rows are not read."""
    makes: str = ""
    """safetensors dtype name of what `transform` returns; empty: that of its first tensor."""
    seconds: float = 0.0
    """About how long `transform` takes beside moving its bytes, for plans."""
    stored: tuple[StoredForm, ...] = ()
    """What each tensor must be, held against the checkpoint when it is opened; empty: `transform`
    takes whatever is there.
    """

    def __post_init__(self) -> None:
        """Raises PluginError for what no parameter can be made of."""
        given: object = self.tensors  # an author may not run a type checker
        if not isinstance(given, tuple) or not given:
            raise PluginError(
                f"ParameterSource: tensors must be a tuple of names, got {given!a}",
                hint=f"write ParameterSource(({given!a},))"
                if isinstance(given, str)
                else "write ParameterSource((first_name, second_name), transform)",
            )
        if self.transform is None and len(self.tensors) > 1:
            raise PluginError(
                f"ParameterSource: {len(self.tensors)} tensors, from {self.tensors[0]!a} on, "
                "need a transform that makes one of them",
                hint="give a function that takes them in this order, for instance one that calls "
                "torch.cat",
            )
        if self.stored and len(self.stored) != len(self.tensors):
            raise PluginError(
                f"ParameterSource: stored has {len(self.stored)} forms for {len(self.tensors)} "
                f"tensors, from {self.tensors[0]!a} on",
                hint="stored must have one StoredForm for each tensor, or none",
            )


@dataclass(frozen=True, slots=True)
class WeightPlan:
    """How a checkpoint's tensors become parameters: each tensor, or each row of one, is used by one
    parameter, or the tensor is listed in `ignored`.

    `parameters` is keyed by the name in the transformers module tree. A tied head names the
    embedding's tensor again.
    """

    parameters: Mapping[str, ParameterSource]
    ignored: frozenset[str] = frozenset()
    experts: Mapping[str, tuple[ParameterSource, ...]] = field(default_factory=dict)
    """The parameters of routed experts, which stack one slice per expert: what makes each slice, in
    the order of the experts. Such a name is not in `parameters`.
    """

    def sources(self) -> Iterator[ParameterSource]:
        """What makes each parameter, and each expert's slice of one."""
        yield from self.parameters.values()
        for slices in self.experts.values():
            yield from slices


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the parts sit in the transformers module tree (dotted module paths), and each layer's
    mixer kind.
    """

    num_layers: int
    embedding: str = "model.embed_tokens"
    layers: str = "model.layers"
    norm: str = "model.norm"
    head: str = "lm_head"
    rotary: str = "model.rotary_emb"
    rotary_axes: int = 0
    """Where the rotary module takes positions [axes, R, T], as for images, in place of [R, T]: how
    many axes. Text has the same position on each.
    """
    mixers: tuple[str, ...] = ()
    """One of "full", "sliding", "recurrent" per layer; empty means all "full"."""
    experts: str = ""
    """Path inside a layer of the module that holds the routed experts, for instance `mlp.experts`;
    empty for a dense model. A layer without that module is dense. The module is called with the
    tokens' states, chosen experts and their weights, and adds up the experts in their order.
    """
    mixer: Callable[..., Tensor] | None = None
    """A layer with routed experts is run in two halves. `mixer(layer, hidden, **options)`, with the
    options of the layer itself, returns the hidden states as `mlp` takes them. None:
    `input_layernorm`, `self_attn` and the residual.
    """
    mlp: Callable[[nn.Module, Tensor], Tensor] | None = None
    """`mlp(layer, hidden)` does the rest of the layer, and may do it twice up to the experts. None:
    `post_attention_layernorm`, `mlp` and the residual.
    """


@dataclass(frozen=True, slots=True)
class StateShape:
    """One tensor of a recurrent state, of one sequence."""

    shape: tuple[int, ...]
    float32: bool = False
    """Whether it is that, whatever the model computes in."""


@dataclass(frozen=True, slots=True)
class CacheKind:
    """What one layer remembers. `window` counts tokens, for "sliding" only."""

    kind: Literal["full", "sliding", "recurrent"] = "full"
    num_kv_heads: int = 0
    head_dim: int = 0
    window: int | None = None
    states: tuple[StateShape, ...] = ()
    """For "recurrent" only: the convolution's state [channels, width], then the recurrent one."""


@dataclass(frozen=True, slots=True)
class Capability:
    """One declared ability: supported in full, or not, with the adapter's own reason."""

    support: Support = "full"
    reason: str = ""

    def __post_init__(self) -> None:
        if self.support != "full" and not self.reason:
            raise ValueError(f"a capability that is {self.support!r} needs a reason")


@dataclass(frozen=True, slots=True)
class CatalogEntry:
    """A model that an adapter knows: enough to list it, fetch it and plan it offline."""

    id: str
    repo: str
    """Hub repository, `owner/name`."""
    num_parameters: int
    weight_bytes: int
    """Bytes of all checkpoint tensors."""
    config: Config = field(repr=False)
    chat: bool = True
    license: str = ""
    ignored_bytes: int = 0
    """Of `weight_bytes`, those of tensors that the adapter ignores."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a weight pass is, or a reading of the model's files before one. Sent to `on_progress`
    after every step of work; cheap to ignore.
    """

    stage: Literal["check", "prefill", "decode"]
    """"prefill" while a pass brings more than one new token per sequence. "check" while files are
    hashed, to know the model's KV in a `kv_dir`: once for each model, then their hashes are known.
    """
    steps_done: int
    steps_total: int
    """A step is one chunk of tokens through one layer, or one part of the head. A layer with routed
    experts is two: its mixer and its MLP. In "check", a byte.
    """
    num_new_tokens: int
    """New tokens in this pass, over all sequences."""
    weight_passes: int
    """Passes finished before this one."""
    weight_bytes_read: int
    """Since the model was opened; in "check", of those that are hashed."""
    given_up_bytes: int = 0
    """Of weights that are not kept in this pass, because others took the machine's memory."""


@dataclass(frozen=True, slots=True)
class Stats:
    """What a model has done since it was opened. Sizes are bytes; `model.stats` makes a new one at
    each call.
    """

    weight_bytes: int
    """All parameters of the model as stored in the checkpoint."""
    resident_bytes: int
    """Of those, kept in memory between passes."""
    device_limit_bytes: int
    device_peak_bytes: int
    host_limit_bytes: int
    host_peak_bytes: int
    process_peak_bytes: int
    """Of the whole process, interpreter and libraries included; 0 where the system does not
    tell.
    """
    weight_bytes_read: int
    """Read from storage by the weight streamer, loading of resident weights not counted."""
    read_seconds: float
    """Time the reading engine spent reading those."""
    weight_passes: int
    kv_tier: str
    kv_bytes_read: int
    kv_disk_bytes: int
    """Largest so far."""
    cached_tokens: int
    """Of prompts, found in a kept prefix and not computed again."""
    prefill_tokens: int
    prefill_seconds: float
    decode_tokens: int
    decode_seconds: float
    """Of passes, and of the draft source between them."""
    reader: str
    """The reading engine in use, by name."""
    attention: str
    chunk_size: int
    experts_routed: int = 0
    """Experts that a layer asked for in a pass, each counted once for each layer and pass."""
    experts_hit: int = 0
    """Of those, found in memory."""
    experts_read: int = 0
    """Of those, read from storage."""
    expert_bytes_read: int = 0
    """For those. What fills free room counts here, and not in `weight_bytes_read`."""
    device_layers: int = 0
    """Layers that are kept on the device between passes."""
    host_layers: int = 0
    """Layers that are kept in host memory, beside a GPU."""
    times_short: int = 0
    """How often memory ran short and kept weights gave way."""
    most_given_up_bytes: int = 0
    """The most of them that were not kept for it in a pass."""
    drafted_tokens: int = 0
    """Tokens that were drafted and checked."""
    accepted_tokens: int = 0
    """Of those that the model's draft source guessed, how many were right."""
    undrafted_passes: int = 0
    """Weight passes of decoding that checked no draft."""
    uploaded_bytes: int = 0
    """Of weights, copied to a device with memory of its own."""
    upload_seconds: float = 0.0
    """That these copies took on the device; measured with a profile alone."""
    upload_waited_seconds: float = 0.0
    """Of those, compute waited; the rest ran beside it. Measured with a profile alone."""
