"""Units, which are read together: a decoder layer, the final norm, or a slice of the head.

A unit knows which checkpoint tensors it needs and how they become parameters; it holds no data.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from types import MappingProxyType

import torch
from torch import Tensor, nn

from ollm_core.contracts.model import Layout
from ollm_core.contracts.tensors import TORCH_NAMES, ParameterSource, TensorInfo, WeightPlan
from ollm_core.device.buffers import ALIGNMENT, round_up
from ollm_core.errors import CheckpointError, OllmError, PluginError, one_line
from ollm_core.plugins.validation import told

TORCH_DTYPES: Mapping[str, torch.dtype] = {
    name: getattr(torch, torch_name) for name, torch_name in TORCH_NAMES.items()
}
PLAIN_FLOATS = ("F64", "F32", "F16", "BF16")
"""What a parameter may be stored in as it is. One of 8 bits is half of a quantised one: its scales
are elsewhere, or lost.
"""


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a unit: its name, its shape, and the `tensors` of the unit that make it."""

    name: str
    shape: tuple[int, ...]
    source: ParameterSource
    tensors: tuple[TensorInfo, ...]
    keeps: torch.dtype | None = None
    """Its dtype, where that is not the one to compute in."""

    def needs_copy(self, dtype: torch.dtype, *, packed: bool = False) -> bool:
        """Whether it cannot simply be a view of the bytes, which are as read, page for page, from
        the file, or `packed`.
        """
        tensor, dtype = self.tensors[0], self.keeps or dtype
        if self.source.transform or TORCH_DTYPES[tensor.dtype] != dtype:
            return True
        if packed:
            return False
        alignment = ALIGNMENT if dtype == torch.float32 else dtype.itemsize
        return tensor.offset % alignment != 0

    def num_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of the finished parameter."""
        return torch.Size(self.shape).numel() * (self.keeps or dtype).itemsize

    def build(self, buffer: Tensor, offsets: Mapping[str, int], dtype: torch.dtype) -> Tensor:
        """The parameter from the bytes read: a view where it can be, else a new tensor."""
        raw = [_as_tensor(buffer, offsets[tensor.name], tensor) for tensor in self.tensors]
        value = self._transformed(raw) if self.source.transform else raw[0]
        if tuple(value.shape) != self.shape:
            hint = "config.json and the weights are of different models"
            if self.source.transform:
                hint += ", or source() of the adapter is wrong"
            raise CheckpointError(
                f"{self.tensors[0].path}: {self.tensors[0].name} has shape {list(value.shape)}"
                f"{' after its transform' * bool(self.source.transform)}, "
                f"{self.name} needs {list(self.shape)}",
                hint=hint,
            )
        dtype = self.keeps or dtype
        value = value.to(dtype)
        if dtype == torch.float32 and value.device.type == "cpu" and value.data_ptr() % ALIGNMENT:
            value = value.clone()
        return value

    def _transformed(self, raw: Sequence[Tensor]) -> Tensor:
        """What the transform makes. Raises PluginError in place of what is no OllmError, and for
        what is no tensor.
        """
        assert self.source.transform is not None, "asked for a transform only"
        fix = "look at the ParameterSource that source() or experts() of the adapter gives"
        try:
            value: object = self.source.transform(*raw)
        except OllmError:
            raise
        except Exception as error:
            shapes = " and ".join(str(list(tensor.shape)) for tensor in raw)
            raise PluginError(
                f"parameter {self.name}: its transform, given {shapes}, raised {one_line(error)}",
                hint=fix,
            ) from error
        if not isinstance(value, Tensor):
            raise PluginError(
                f"parameter {self.name}: its transform must return a tensor, got {told(value)}",
                hint=fix,
            )
        return value


@dataclass(frozen=True)
class WeightUnit:
    """Parameters that are acquired together, in the order in which they are given out."""

    name: str
    parameters: tuple[Parameter, ...]
    tensors: tuple[TensorInfo, ...] = field(init=False)
    packed_places: tuple[int, ...] = field(init=False, repr=False, compare=False)
    """Where each of its tensors begins when they are side by side, as stored, each at a multiple of
    ALIGNMENT.
    """
    packed_bytes: int = field(init=False, repr=False, compare=False)
    """Bytes of all of that."""

    def __post_init__(self) -> None:
        distinct = {tensor.name: tensor for p in self.parameters for tensor in p.tensors}
        object.__setattr__(self, "tensors", tuple(distinct.values()))
        sizes = (round_up(tensor.num_bytes, ALIGNMENT) for tensor in self.tensors)
        *places, end = accumulate(sizes, initial=0)
        object.__setattr__(self, "packed_places", tuple(places))
        object.__setattr__(self, "packed_bytes", end)

    @property
    def file_bytes(self) -> int:
        """Bytes of its tensors as stored."""
        return sum(tensor.num_bytes for tensor in self.tensors)

    def parts(self, buffer: Tensor, offsets: Sequence[int]) -> list[Tensor]:
        """The bytes of its tensors, which begin at `offsets` in `buffer`."""
        pairs = zip(self.tensors, offsets, strict=True)
        return [buffer[offset : offset + tensor.num_bytes] for tensor, offset in pairs]

    def copied_bytes(self, dtype: torch.dtype, *, packed: bool = False) -> int:
        """Bytes of new tensors made each time it is acquired from a streaming buffer."""
        made = (p for p in self.parameters if p.needs_copy(dtype, packed=packed))
        return sum(p.num_bytes(dtype) for p in made)

    @property
    def scratch_bytes(self) -> int:
        """Bytes that building holds for a while beside its arguments and results."""
        return max((p.source.scratch_bytes for p in self.parameters), default=0)

    @property
    def seconds(self) -> float:
        """About how long its transforms take beside moving bytes, for plans."""
        return sum(p.source.seconds for p in self.parameters)

    def build(self, buffer: Tensor, offsets: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
        """All parameters in order, ready for a module; `offsets` are those of `tensors` in
        `buffer`.
        """
        by_name = {
            tensor.name: offset for tensor, offset in zip(self.tensors, offsets, strict=True)
        }
        built = (p.build(buffer, by_name, dtype) for p in self.parameters)
        return [nn.Parameter(value, requires_grad=False) for value in built]


@dataclass(frozen=True, slots=True)
class Units:
    """A model cut into units: the layers, then the head, in pass order; the norm and the embedding
    beside them.
    """

    layers: tuple[WeightUnit, ...]
    head: tuple[WeightUnit, ...]
    norm: WeightUnit
    embedding: TensorInfo
    experts: Mapping[int, tuple[WeightUnit, ...]] = field(default_factory=dict)
    """By layer, where there are routed experts: a unit for each. They are not in pass order."""

    @property
    def in_pass_order(self) -> tuple[WeightUnit, ...]:
        """The units that a weight pass walks, first to last."""
        return self.layers + self.head


def cut_units(
    layout: Layout,
    plan: WeightPlan,
    tensors: Mapping[str, TensorInfo],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    slice_head: bool,
    kept_dtypes: Mapping[str, torch.dtype] = MappingProxyType({}),
    outer: Sequence[str] = (),
) -> Units:
    """Cut a model into units.

    `shapes` are those of the skeleton's parameters. With `slice_head` the head is cut over the
    vocabulary into parts no larger than the largest layer, so that it needs no larger buffer.
    `kept_dtypes` and `outer` are those of the skeleton.
    Raises CheckpointError if the plan, the checkpoint and the skeleton do not agree.
    """
    parameters = {
        name: replace(one, keeps=kept_dtypes[name]) if name in kept_dtypes else one
        for name, one in _checked(plan, tensors, shapes)
    }
    _check_rows(plan, tensors)

    def below(prefix: str) -> tuple[Parameter, ...]:
        return tuple(p for name, p in parameters.items() if name.startswith(f"{prefix}."))

    layers = tuple(
        WeightUnit(f"layer {i}", below(f"{layout.layers}.{i}")) for i in range(layout.num_layers)
    )
    norm = tuple(parameters[name] for name in outer) if layout.own_forward else below(layout.norm)
    head = parameters[f"{layout.head}.weight"]
    limit = max(unit.file_bytes for unit in layers) if slice_head else head.tensors[0].num_bytes
    embedding = parameters[f"{layout.embedding}.weight"]
    if embedding.source.transform is not None:
        raise CheckpointError(
            f"{embedding.tensors[0].path}: the input embedding is made from "
            f"{embedding.tensors[0].name}, but its rows are read one by one, as they are stored",
            hint="store the input embedding as it is; a codec may encode all else",
        )
    return Units(
        layers,
        (WeightUnit("head", below(layout.head)),)
        if layout.own_forward
        else tuple(_head_slices(head, limit)),
        WeightUnit("norm", norm),
        embedding.tensors[0],
        dict(_expert_units(layout, plan, tensors, shapes)),
    )


def _checked(
    plan: WeightPlan, tensors: Mapping[str, TensorInfo], shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, Parameter]]:
    for name, shape in shapes.items():
        if name in plan.experts:
            continue
        source = plan.parameters.get(name)
        if source is None:
            raise CheckpointError(
                f"no checkpoint tensor is planned for parameter {name}",
                hint="layer_parameters() of the adapter must name it, or weights(), where that is "
                "its own",
            )
        yield name, _parameter(name, shape, source, tensors)


def _parameter(
    name: str,
    shape: tuple[int, ...],
    source: ParameterSource,
    tensors: Mapping[str, TensorInfo],
) -> Parameter:
    found = tuple(_part(tensors[tensor], source.row, name) for tensor in source.tensors)
    for tensor, form in zip(found, source.stored, strict=False):
        if (tensor.dtype, tensor.shape) != (form.dtype, form.shape):
            raise CheckpointError(
                f"{tensor.path}: {tensor.name} is {tensor.dtype} {list(tensor.shape)}, "
                f"{name} needs {form.dtype} {list(form.shape)}",
                hint="the checkpoint is damaged or half converted, or config.json is of another "
                "model",
            )
    for tensor in found:
        if tensor.dtype not in TORCH_DTYPES:
            raise CheckpointError(
                f"{tensor.path}: {tensor.name} has dtype {tensor.dtype}, which is not supported",
                hint=f"tensors must be of {', '.join(TORCH_DTYPES)}",
            )
        if source.transform is None and tensor.shape != shape:
            raise CheckpointError(
                f"{tensor.path}: {tensor.name} has shape {list(tensor.shape)}, "
                f"config.json asks for {list(shape)}",
                hint="config.json and the weights are of different models",
            )
        if source.transform is None and tensor.dtype not in PLAIN_FLOATS:
            raise CheckpointError(
                f"{tensor.path}: {tensor.name} has dtype {tensor.dtype}, need one of "
                f"{', '.join(PLAIN_FLOATS)}",
                hint="quantised checkpoints need an adapter that knows them",
            )
    return Parameter(name, shape, source, found)


def _part(tensor: TensorInfo, row: int | None, name: str) -> TensorInfo:
    """The tensor, or the one row of it that is wanted for parameter `name`."""
    if row is None:
        return tensor
    if not tensor.shape or not 0 <= row < tensor.shape[0]:
        raise CheckpointError(
            f"{tensor.path}: {tensor.name} has shape {list(tensor.shape)}, {name} needs row {row}",
            hint="config.json and the weights are of different models",
        )
    return tensor.row(row)


def _check_rows(plan: WeightPlan, tensors: Mapping[str, TensorInfo]) -> None:
    """Raises CheckpointError if rows are left over of a tensor that is used row by row."""
    used: dict[str, set[int]] = {}
    for source in plan.sources():
        if source.row is not None:
            for tensor in source.tensors:
                used.setdefault(tensor, set()).add(source.row)
    for name, rows in used.items():
        num_rows = tensors[name].shape[0] if tensors[name].shape else 0
        if len(rows) < num_rows and max(rows) < num_rows:  # a row too far has its own error
            raise CheckpointError(
                f"{tensors[name].path}: {name} has shape {list(tensors[name].shape)}, "
                f"only {len(rows)} rows of it are used",
                hint="config.json and the weights are of different models",
            )


def _expert_units(
    layout: Layout,
    plan: WeightPlan,
    tensors: Mapping[str, TensorInfo],
    shapes: Mapping[str, tuple[int, ...]],
) -> Iterator[tuple[int, tuple[WeightUnit, ...]]]:
    """Each layer with routed experts, and a unit for each of these."""
    planned = set(plan.experts)
    for layer_idx in range(layout.num_layers if layout.experts else 0):
        prefix = f"{layout.layers}.{layer_idx}.{layout.experts}."
        stacks = [
            _stack(name, shape, plan, tensors)
            for name, shape in shapes.items()
            if name.startswith(prefix)
        ]
        planned = {name for name in planned if not name.startswith(prefix)}
        if len({len(stack) for stack in stacks}) > 1:
            raise CheckpointError(f"the parameters of {prefix[:-1]} are for unequal many experts")
        if stacks:
            yield (
                layer_idx,
                tuple(
                    WeightUnit(f"expert {i} of layer {layer_idx}", parameters)
                    for i, parameters in enumerate(zip(*stacks, strict=True))
                ),
            )
    if planned:
        raise CheckpointError(
            f"experts are planned for {min(planned)}, which is no parameter of an experts module",
            hint="`experts` of layout() must be the path of that module inside a layer",
        )


def _stack(
    name: str, shape: tuple[int, ...], plan: WeightPlan, tensors: Mapping[str, TensorInfo]
) -> list[Parameter]:
    """One parameter of an experts module, slice by slice."""
    slices = plan.experts.get(name)
    if slices is None or len(slices) != shape[0]:
        raise CheckpointError(
            f"{0 if slices is None else len(slices)} experts are planned for parameter {name}, "
            f"config.json asks for {shape[0]}",
        )
    return [
        _parameter(f"{name}[{i}]", shape[1:], source, tensors) for i, source in enumerate(slices)
    ]


def _head_slices(head: Parameter, limit: int) -> Iterator[WeightUnit]:
    """The head cut into parts of at most `limit` bytes as stored, as equal as can be. One that a
    transform or a codec makes stays whole.
    """
    tensor = head.tensors[0]
    num_rows = head.shape[0]
    num_parts = min(-(-tensor.num_bytes // limit), num_rows) if head.source.transform is None else 1
    for part in range(num_parts):
        start, stop = part * num_rows // num_parts, (part + 1) * num_rows // num_parts
        rows = head.tensors if num_parts == 1 else (tensor.rows(start, stop),)
        shape = (stop - start, *head.shape[1:])
        yield WeightUnit(
            f"head rows {start} to {stop}", (Parameter(head.name, shape, head.source, rows),)
        )


def _as_tensor(buffer: Tensor, offset: int, info: TensorInfo) -> Tensor:
    dtype = TORCH_DTYPES[info.dtype]
    raw = buffer[offset : offset + info.num_bytes]
    if raw.storage_offset() % dtype.itemsize:
        raw = raw.clone()  # a header of odd length: bytes cannot be viewed in place
    return raw.view(dtype).view(info.shape)
