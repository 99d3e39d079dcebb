"""Weight codecs: tensors that a checkpoint stores in another, lossless form.

Nothing is read here. Codecs say which stored tensors make which logical one; a parameter's source
is then composed: its tensors are decoded first, then transformed as the adapter says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ollm_core.checkpoint.safetensors import Checkpoint
from ollm_core.contracts.model import Config
from ollm_core.contracts.tensors import DTYPE_BYTES, EncodedTensor, ParameterSource, WeightPlan
from ollm_core.errors import CheckpointError, OllmError, PluginError, UnsupportedError, one_line
from ollm_core.plugins.factories import CodecRequest
from ollm_core.plugins.loader import Offer
from ollm_core.weights.formats.compressed import BUILT_IN
from ollm_core.weights.units import TORCH_DTYPES


class LogicalTensors:
    """The tensors of a checkpoint as its model family names them: those stored as they are, and
    those that codecs decode.
    """

    def __init__(self, checkpoint: Checkpoint, config: Config, codecs: Mapping[str, Offer]) -> None:
        """Ask each codec, the built-in one too. Raises PluginError, naming the codec, for an answer
        that cannot be used.
        """
        self._checkpoint = checkpoint
        self._encoded: dict[str, EncodedTensor] = {}
        taken: dict[str, Offer] = {}
        request = CodecRequest(config, checkpoint.tensors, checkpoint.metadata)
        for codec in (BUILT_IN, *codecs.values()):
            answer: Mapping[str, EncodedTensor] = codec.make(Mapping, request)
            for name, encoded in answer.items():
                self._check(codec, name, encoded)
                if name in self._encoded or any(
                    taken.get(t, codec) != codec for t in encoded.tensors
                ):
                    raise PluginError(f"{codec} decodes {name}, and so does another codec")
                self._encoded[name] = encoded
                taken |= dict.fromkeys(encoded.tensors, codec)
        plain = [name for name in checkpoint.tensors if name not in taken]
        if clash := sorted(self._encoded.keys() & set(plain)):
            raise CheckpointError(
                f"{checkpoint.tensors[clash[0]].path}: {clash[0]} is stored both as it is and "
                "encoded"
            )
        self.names: tuple[str, ...] = (*plain, *self._encoded)
        """Logical names, in no order that matters."""

    def dtypes(self) -> Iterator[str]:
        """safetensors dtype names of the tensors, decoded, in the order in which transformers looks
        at them: by the name of the file, then by that of the tensor.
        """
        stored = self._checkpoint.tensors

        def place(name: str) -> tuple[str, str]:
            encoded = self._encoded.get(name)
            return stored[encoded.tensors[0] if encoded else name].path.name, name

        for name in sorted(self.names, key=place):
            encoded = self._encoded.get(name)
            yield encoded.dtype if encoded else stored[name].dtype

    def is_encoded(self, name: str) -> bool:
        """Whether a codec makes the tensor of this logical name."""
        return name in self._encoded

    def check_device(self, device: torch.device) -> None:
        """Raises UnsupportedError if a tensor can only be decoded elsewhere than on `device`."""
        for name, encoded in self._encoded.items():
            if encoded.cpu_only and device.type != "cpu":
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
        found = [(tensor, self._encoded.get(tensor)) for tensor in source.tensors]
        parts = [encoded for _, encoded in found if encoded]
        if not parts:
            return source
        if source.row is not None:
            raise CheckpointError(
                f"{self._checkpoint.directory}: {name} is row {source.row} of "
                f"{source.tensors[0]}, which is encoded as a whole",
                hint="encode each expert's tensors alone, or leave them as they are",
            )
        if source.transform is None and shape is not None and parts[0].shape != shape:
            raise CheckpointError(
                f"{self._checkpoint.directory}: {source.tensors[0]} decodes to shape "
                f"{list(parts[0].shape)}, {name} needs {list(shape)}",
                hint="config.json and the weights are of different models",
            )
        scratch = max(part.scratch_bytes for part in parts) + source.scratch_bytes
        if source.transform is not None or TORCH_DTYPES[parts[0].dtype] != dtype:
            scratch += sum(_num_bytes(part) for part in parts)
        stored = [
            t for tensor, encoded in found for t in (encoded.tensors if encoded else (tensor,))
        ]
        return ParameterSource(
            tuple(stored),
            _Decode(tuple(found), source.transform),
            scratch,
            makes=parts[0].dtype if source.transform is None else source.makes,
            seconds=source.seconds + sum(part.decode_seconds for part in parts),
        )

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


@dataclass(frozen=True, slots=True)
class _Decode:
    """A transform that takes stored tensors: decodes those that need it, then goes on as the
    adapter says.
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


def _num_bytes(encoded: EncodedTensor) -> int:
    return torch.Size(encoded.shape).numel() * DTYPE_BYTES[encoded.dtype]
