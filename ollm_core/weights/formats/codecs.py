"""Weight codecs: tensors that a checkpoint stores in another form than the model family has them.

Nothing is read here. Codecs say which stored tensors make which logical one; a parameter's source
is then composed: its tensors, or the row of each that it is made of, are decoded first, then
transformed as the adapter says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ollm_core.checkpoint.safetensors import Checkpoint
from ollm_core.contracts.model import Config
from ollm_core.contracts.tensors import (
    DTYPE_BYTES,
    EncodedTensor,
    ParameterSource,
    StoredForm,
    WeightPlan,
)
from ollm_core.errors import CheckpointError, OllmError, PluginError, UnsupportedError, one_line
from ollm_core.plugins.factories import CodecRequest, QuantizedCodec
from ollm_core.plugins.loader import Offer
from ollm_core.weights.formats import compressed, mxfp4
from ollm_core.weights.units import TORCH_DTYPES

BUILT_IN = (compressed.BUILT_IN, mxfp4.BUILT_IN)
"""Those that every checkpoint is shown, beside what plugins offer."""


class LogicalTensors:
    """The tensors of a checkpoint as its model family names them: those stored as they are, and
    those that codecs decode.
    """

    def __init__(self, checkpoint: Checkpoint, config: Config, codecs: Mapping[str, Offer]) -> None:
        """Ask each codec, built-in ones too. Raises PluginError, naming the codec, for an answer
        that cannot be used.
        """
        self._checkpoint = checkpoint
        self._encoded: dict[str, EncodedTensor] = {}
        self._quantized: set[str] = set()
        taken: dict[str, Offer] = {}
        request = CodecRequest(config, checkpoint.tensors, checkpoint.metadata)
        for codec in (*BUILT_IN, *codecs.values()):
            answer: Mapping[str, EncodedTensor] = codec.make(Mapping, request)
            for name, encoded in answer.items():
                self._check(codec, name, encoded)
                if name in self._encoded or any(
                    taken.get(t, codec) != codec for t in encoded.tensors
                ):
                    raise PluginError(f"{codec} decodes {name}, and so does another codec")
                self._encoded[name] = encoded
                taken |= dict.fromkeys(encoded.tensors, codec)
            if _is_quantized(codec):
                self._quantized.update(answer)
        plain = [name for name in checkpoint.tensors if name not in taken]
        if clash := sorted(self._encoded.keys() & set(plain)):
            raise CheckpointError(
                f"{checkpoint.tensors[clash[0]].path}: {clash[0]} is stored both as it is and "
                "encoded"
            )
        self.names: tuple[str, ...] = (*plain, *self._encoded)
        """Logical names, in no order that matters."""

    def dtypes(self) -> Iterator[str]:
        """safetensors dtype names in the order in which transformers looks at them: by the name of
        the file, then by that of the tensor. Tensors that it reads as they are stored have the
        dtypes of that, others those of what is decoded.
        """
        stored = self._checkpoint.tensors
        found: list[tuple[str, str, str]] = []
        for name in self.names:
            encoded = self._encoded.get(name)
            if encoded is None or name in self._quantized:
                infos = [stored[tensor] for tensor in self.stored(name)]
                found += [(info.path.name, info.name, info.dtype) for info in infos]
            else:
                found.append((stored[encoded.tensors[0]].path.name, name, encoded.dtype))
        for _, _, dtype in sorted(found):
            yield dtype

    def is_encoded(self, name: str) -> bool:
        """Whether a codec makes the tensor of this logical name."""
        return name in self._encoded

    def stored(self, name: str) -> tuple[str, ...]:
        """Names of the stored tensors that make the one of a logical name."""
        encoded = self._encoded.get(name)
        return encoded.tensors if encoded else (name,)

    def check_device(self, device: torch.device) -> None:
        """Raises UnsupportedError if a tensor can only be decoded elsewhere than on `device`."""
        for name, encoded in self._encoded.items():
            cpu_only = encoded.cpu_only or (encoded.row is not None and encoded.row.cpu_only)
            if cpu_only and device.type != "cpu":
                raise UnsupportedError(
                    f"{self._checkpoint.directory}: {name} is compressed in a form that only a CPU "
                    f"decodes, the device is {device}",
                    hint="use the checkpoint that it was converted from, or --device cpu",
                )

    def compose(
        self, plan: WeightPlan, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype
    ) -> WeightPlan:
        """`plan`, which is over logical names, as one over stored tensors.

        `shapes` are those of the skeleton's parameters, `dtype` is the one to compute in. Raises
        CheckpointError if a decoded tensor is of another shape than its parameter.
        """
        if not self._encoded:
            return plan
        parameters = {
            name: self._composed(name, source, shapes.get(name), dtype)
            for name, source in plan.parameters.items()
        }
        experts = {
            name: tuple(
                self._composed(f"{name}[{i}]", source, shapes[name][1:], dtype)
                for i, source in enumerate(slices)
            )
            for name, slices in plan.experts.items()
            if name in shapes
        }
        return replace(plan, parameters=parameters, experts={**plan.experts, **experts})

    def _composed(
        self,
        name: str,
        source: ParameterSource,
        shape: tuple[int, ...] | None,
        dtype: torch.dtype,
    ) -> ParameterSource:
        found = [(tensor, self._part(name, source, tensor)) for tensor in source.tensors]
        parts = [encoded for _, encoded in found if encoded]
        if not parts:
            return source
        first, plain = parts[0], source.transform is None
        needed = shape if plain and shape is not None else first.shape
        if first.shape != needed and (not first.stored or len(first.shape) != len(needed)):
            raise CheckpointError(
                f"{self._checkpoint.directory}: {source.tensors[0]} decodes to shape "
                f"{list(first.shape)}, {name} needs {list(needed)}",
                hint="config.json and the weights are of different models",
            )
        scratch = max(part.scratch_bytes for part in parts) + source.scratch_bytes
        # A row that is converted is an expert's, and counted with the others of that (made_bytes).
        if not plain or (TORCH_DTYPES[first.dtype] != dtype and source.row is None):
            scratch += sum(_num_bytes(part) for part in parts)
        return ParameterSource(
            tuple(t for tensor in source.tensors for t in self.stored(tensor)),
            _Decode(tuple(found), source.transform),
            scratch,
            source.row,
            makes=first.dtype if plain else source.makes,
            seconds=source.seconds + sum(part.decode_seconds for part in parts),
            stored=self._forms(source, found, needed if plain else None),
        )

    def _part(self, name: str, source: ParameterSource, tensor: str) -> EncodedTensor | None:
        """How `tensor`, or the row of it that `source` takes, is decoded; None if it is stored as
        it is. Raises CheckpointError for a row of what only decodes whole.
        """
        encoded = self._encoded.get(tensor)
        if encoded is None or source.row is None:
            return encoded
        if encoded.row is None:
            raise CheckpointError(
                f"{self._checkpoint.directory}: {name} is row {source.row} of "
                f"{source.tensors[0]}, which is encoded as a whole",
                hint="encode each expert's tensors alone, or leave them as they are",
            )
        return encoded.row

    def _forms(
        self,
        source: ParameterSource,
        found: Sequence[tuple[str, EncodedTensor | None]],
        needed: tuple[int, ...] | None,
    ) -> tuple[StoredForm, ...]:
        """What each stored tensor must be, or row of one, for a decoded tensor of the shape
        `needed`; None: as the codec takes it. Nothing where no codec and no adapter says it.
        """
        if not source.stored and not any(part and part.stored for _, part in found):
            return ()
        said = source.stored or (None,) * len(found)
        forms: list[StoredForm] = []
        for (tensor, part), form in zip(found, said, strict=True):
            if part is not None and part.stored is not None:
                forms += part.stored(part.shape if needed is None else needed)
            elif part is None and form is not None:
                forms.append(form)
            else:  # whatever is there
                infos = (self._checkpoint.tensors[name] for name in self.stored(tensor))
                skipped = source.row is not None
                forms += (StoredForm(info.dtype, info.shape[skipped:]) for info in infos)
        return tuple(forms)

    def _check(self, codec: Offer, name: object, encoded: object) -> None:
        """Raises PluginError for an entry that is not what it should be."""
        if not isinstance(name, str) or not isinstance(encoded, EncodedTensor):
            raise PluginError(f"{codec} must return names and EncodedTensor objects")
        stored = self._checkpoint.tensors
        missing = [tensor for tensor in encoded.tensors if tensor not in stored]
        if missing or not encoded.tensors:
            raise PluginError(f"{codec} decodes {name!a} from {missing}, which is not stored")
        if encoded.dtype not in TORCH_DTYPES:
            raise PluginError(f"{codec} decodes {name!a} to the unknown dtype {encoded.dtype!a}")
        if any(type(size) is not int or size < 0 for size in encoded.shape):
            raise PluginError(f"{codec} decodes {name!a} to the shape {encoded.shape!a}")
        row = encoded.row
        if row is not None and (row.tensors, row.dtype, row.shape, row.row) != (
            encoded.tensors, encoded.dtype, encoded.shape[1:], None,
        ):  # fmt: skip
            raise PluginError(
                f"{codec} decodes {name!a} to {encoded.dtype} {list(encoded.shape)}, and its row "
                f"to {row.dtype} {list(row.shape)}",
                hint="`row` must be of the same tensors and dtype, without the first dimension",
            )


def quantized(codecs: Mapping[str, Offer]) -> dict[str, Offer]:
    """Those that can be asked about a checkpoint that is not there."""
    return {name: codec for name, codec in codecs.items() if _is_quantized(codec)}


def as_stored(
    config: Config,
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    codecs: Mapping[str, Offer],
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """dtype and shape of the tensors that a checkpoint of `config` holds, by name, where those of
    the model are `tensors`. Raises PluginError for an answer of a codec that cannot be used.
    """
    forms: Mapping[str, StoredForm] = {name: StoredForm(*form) for name, form in tensors.items()}
    for codec in (*BUILT_IN, *codecs.values()):
        factory: object = codec.factory
        if isinstance(factory, QuantizedCodec):
            describe = replace(codec, factory=factory.describe)
            forms = describe.make(Mapping, config, forms)
    return {name: (form.dtype, form.shape) for name, form in forms.items()}


@dataclass(frozen=True, slots=True)
class _Decode:
    """A transform that takes stored tensors, or rows of them: decodes those that need it, then goes
    on as the adapter says.
    """

    parts: tuple[tuple[str, EncodedTensor | None], ...]
    """Logical names; None for a tensor that is stored as it is."""
    then: Callable[..., Tensor] | None

    def __call__(self, *stored: Tensor) -> Tensor:
        left = iter(stored)
        made = [
            next(left)
            if encoded is None
            else _decoded(name, encoded, [next(left) for _ in encoded.tensors])
            for name, encoded in self.parts
        ]
        return made[0] if self.then is None else self.then(*made)


def _decoded(name: str, encoded: EncodedTensor, stored: list[Tensor]) -> Tensor:
    """What `decode` gives, which must be what the codec has said."""
    try:
        value = encoded.decode(*stored)
    except OllmError:
        raise
    except Exception as error:
        raise CheckpointError(f"{name} cannot be decoded: {one_line(error)}") from error
    if value.dtype != TORCH_DTYPES[encoded.dtype] or tuple(value.shape) != encoded.shape:
        raise CheckpointError(
            f"{name} was decoded to {value.dtype} {list(value.shape)}, "
            f"its codec said {encoded.dtype} {list(encoded.shape)}"
        )
    memory = value.untyped_storage().data_ptr()
    if any(memory == tensor.untyped_storage().data_ptr() for tensor in stored):
        value = value.clone()  # a view would keep the buffer that it was read into
    return value


def _is_quantized(codec: Offer) -> bool:
    return isinstance(codec.factory, QuantizedCodec)


def _num_bytes(encoded: EncodedTensor) -> int:
    return torch.Size(encoded.shape).numel() * DTYPE_BYTES[encoded.dtype]
