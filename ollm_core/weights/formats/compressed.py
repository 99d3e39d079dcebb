"""The built-in weight codec: checkpoints that `ollm convert` has written.

A tensor NAME of bfloat16 is stored there as two, both of bytes: `NAME.BF16.low`, of its shape, and
`NAME.BF16.zstd`, its compressed high plane; float16 likewise. The metadata of a file says whether
its tensors are to be read so. What the bytes hold is for `planes` to say.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ollm_core.contracts.tensors import TORCH_NAMES, EncodedTensor, TensorInfo
from ollm_core.errors import CheckpointError, UnsupportedError
from ollm_core.plugins.factories import CodecRequest
from ollm_core.plugins.loader import Offer
from ollm_core.weights.formats import byte_planes

if TYPE_CHECKING:
    from torch import Tensor

FORMAT_KEY = "ollm_compressed"
"""In a file's metadata: which form of compressed tensors it holds."""
FORMAT = "zstd-planes-1"
DTYPES = ("BF16", "F16")
"""What can be compressed, as safetensors names it."""

_AGAIN = "convert the model again with `ollm convert`"


def low_name(name: str, dtype: str) -> str:
    """The stored tensor of low bytes."""
    return f"{name}.{dtype}.low"


def zstd_name(name: str, dtype: str) -> str:
    """The stored tensor of compressed high bytes."""
    return f"{name}.{dtype}.zstd"


def require_zstandard() -> None:
    """Raises UnsupportedError where the package that decodes is missing."""
    if importlib.util.find_spec("zstandard") is None:
        raise UnsupportedError(
            "compressed weights need the zstandard package",
            hint="pip install 'ollm-core[compressed]'",
        )


def compressed_weights(request: CodecRequest) -> Mapping[str, EncodedTensor]:
    """The compressed tensors of a checkpoint by name, none in one that was not converted.

    Raises CheckpointError for a form that is not known, or a tensor that lacks its other half;
    UnsupportedError where the package that decodes is missing.
    """
    files = {path for path, metadata in request.metadata.items() if _is_converted(path, metadata)}
    if not files:
        return {}
    require_zstandard()
    import torch

    num_threads = torch.get_num_threads()
    found: dict[str, EncodedTensor] = {}
    for info in request.tensors.values():
        if info.path not in files:
            continue
        base, _, part = info.name.rpartition(".")
        name, _, dtype = base.rpartition(".")
        if not name or dtype not in DTYPES or part not in ("low", "zstd"):
            continue
        if name not in found:
            found[name] = _encoded(request.tensors, info.path, name, dtype, num_threads)
        elif found[name].dtype != dtype:
            raise CheckpointError(
                f"{info.path}: {name!a} is stored as {dtype} and as {found[name].dtype}",
                hint=_AGAIN,
            )
    return found


def _is_converted(path: Path, metadata: Mapping[str, str]) -> bool:
    form = metadata.get(FORMAT_KEY)
    if form not in (None, FORMAT):
        raise CheckpointError(
            f"{path}: its weights are compressed as {form!a}, this version reads {FORMAT!a}",
            hint="use the version that converted the model, or convert it again",
        )
    return form is not None


def _encoded(
    tensors: Mapping[str, TensorInfo], path: Path, name: str, dtype: str, num_threads: int
) -> EncodedTensor:
    names = zstd_name(name, dtype), low_name(name, dtype)
    for stored in names:
        if stored not in tensors or tensors[stored].path != path:
            raise CheckpointError(f"{path}: lacks tensor {stored!a}", hint=_AGAIN)
    zstd, low = tensors[names[0]], tensors[names[1]]
    for info in (zstd, low):
        if info.dtype != "U8":
            raise CheckpointError(
                f"{path}: {info.name!a} is {info.dtype}, expected U8", hint=_AGAIN
            )
    count = low.num_bytes
    if count == 0 or len(zstd.shape) != 1 or zstd.num_bytes < byte_planes.least_bytes(count):
        raise CheckpointError(
            f"{path}: {zstd.name!a} is {list(zstd.shape)} bytes, expected a row of at least "
            f"{byte_planes.least_bytes(count)} for {count} elements",
            hint=_AGAIN,
        )
    return EncodedTensor(
        names,
        dtype,
        low.shape,
        _Decode(f"{path}: {name}", dtype, num_threads),
        byte_planes.scratch_bytes(count, num_threads),
        cpu_only=True,
        decode_seconds=byte_planes.decode_seconds(count, num_threads),
    )


@dataclass(frozen=True, slots=True)
class _Decode:
    """Makes one tensor of its two planes."""

    name: str
    """For messages."""
    dtype: str
    num_threads: int

    def __call__(self, zstd: Tensor, low: Tensor) -> Tensor:
        import torch

        dtype: torch.dtype = getattr(torch, TORCH_NAMES[self.dtype])
        return byte_planes.decode(zstd, low, dtype, self.num_threads, self.name)


BUILT_IN = Offer("ollm_weight_codecs", "compressed", compressed_weights, "oLLM itself")
"""As a plugin would offer it."""
