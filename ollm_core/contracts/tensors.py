"""Tensors of a checkpoint, and which of them make each parameter: frozen data, free of torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ollm_core.errors import PluginError

if TYPE_CHECKING:
    from torch import Tensor

_DTYPES = (
    # name in safetensors, in torch where a parameter may be stored in it, bytes per element
    ("F64", "float64", 8),
    ("F32", "float32", 4),
    ("F16", "float16", 2),
    ("BF16", "bfloat16", 2),
    ("F8_E4M3", "float8_e4m3fn", 1),
    ("F8_E5M2", "float8_e5m2", 1),
    ("F8_E8M0", None, 1),
    ("I64", "int64", 8),
    ("U64", None, 8),
    ("I32", "int32", 4),
    ("U32", None, 4),
    ("I16", "int16", 2),
    ("U16", None, 2),
    ("I8", "int8", 1),
    ("U8", "uint8", 1),
    ("BOOL", "bool", 1),
)
DTYPE_BYTES: Mapping[str, int] = {name: num_bytes for name, _, num_bytes in _DTYPES}
"""Bytes per element of the safetensors dtypes that a checkpoint may hold."""
TORCH_NAMES: Mapping[str, str] = {name: torch for name, torch, _ in _DTYPES if torch}
"""torch's names of those that core reads; the others are for codecs."""


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
class StoredForm:
    """What a transform or a codec expects of one stored tensor, or of the row of it that it is
    given.
    """

    dtype: str
    """safetensors dtype name, a key of `DTYPE_BYTES`."""
    shape: tuple[int, ...]


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
    `shape` there, bit for bit what was encoded, or what transformers makes of a form that loses
    some of it. Called in each weight pass.
    """
    scratch_bytes: int = 0
    """The most that `decode` holds beside its arguments and its result."""
    cpu_only: bool = False
    """Whether `decode` takes and makes tensors on the CPU only: another device is refused."""
    decode_seconds: float = 0.0
    """About how long `decode` takes, for plans; what is quick need not say."""
    row: EncodedTensor | None = None
    """How one row of the first dimension is made, such as one expert: its `decode` takes that row
    of each of the same `tensors`, its `shape` is without that dimension. None: only the whole is
    made.
    """
    stored: Callable[[tuple[int, ...]], tuple[StoredForm, ...]] | None = None
    """The shape of a decoded tensor, of as many dimensions as `shape` -> what its stored tensors
    must be. Core holds the checkpoint against it, for the shape that a parameter needs. None:
    `decode` takes whatever is there.
    """


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
