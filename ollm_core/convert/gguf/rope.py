"""Finds the rope parameters of config.json that give the rotary frequencies of a GGUF file.

llama.cpp turns by `base ** (-2i / n)`, divided by `rope_freqs.weight[i]` and by a linear factor.
Parameters are looked for that make just these frequencies in transformers' own rotary module; where
none do, the file is refused. So nothing is believed, whatever has written the file.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ollm_core.convert.gguf.header import GGUFHeader
from ollm_core.errors import InputError, UnsupportedError

FREQS = "rope_freqs.weight"
KEYS = frozenset({"rope.freq_base", "rope.dimension_count", "rope.scaling.type"}) | {
    "rope.scaling.factor", "rope.scaling.finetuned", "rope.scaling.original_context_length",
    "rope.scale_linear",
}  # fmt: skip
"""Those behind the architecture's name that are dealt with here."""

_DEFAULT_BASE = 10000.0  # llama.cpp's, where the file does not say
_CLOSE = 1e-6
"""How far frequencies may differ, relatively: some steps of float32, which holds the divisors."""
_DIGITS = 6
_PUBLISHED = ((8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192))
"""factor, low_freq_factor, high_freq_factor and original_max_position_embeddings of Llama 3.1 and
3.2.
"""

RopeParameters = dict[str, Any]


def set_rope(header: GGUFHeader, model: PreTrainedModel) -> None:
    """Write rope parameters into the model's config that make the file's rotary frequencies.

    Raises InputError where the file contradicts itself, UnsupportedError where no parameters do.
    """
    config: Any = model.config.get_text_config()
    modules = dict(_rotary_modules(model))
    if not modules:
        if FREQS in header.tensors:
            raise UnsupportedError(f"{header.path}: {FREQS} is of a model that rotates nothing")
        return
    plain, divisors = _plain(header, config), _divisors(header)
    if divisors.shape not in ((1,), plain.shape):
        raise InputError(
            f"{header.path}: {FREQS} has {divisors.numel()} numbers, need {plain.numel()}"
        )
    wanted = plain / divisors
    stated = config.rope_parameters
    for parameters in _candidates(stated, divisors, plain):
        config.rope_parameters = parameters
        if all(_makes(module, config, wanted) for module in modules.values()):
            return
    config.rope_parameters = stated
    raise UnsupportedError(
        f"{header.path}: no rope parameters of transformers make the rotary frequencies of the "
        f"file, which {FREQS if FREQS in header.tensors else 'its rope keys'} states",
        hint="use a safetensors checkpoint of the model",
    )


def _rotary_modules(model: nn.Module) -> Iterator[tuple[type[nn.Module], nn.Module]]:
    """A module of each type that holds frequencies."""
    for module in model.modules():
        if any(True for _ in _frequencies(module)):
            yield type(module), module


def _frequencies(module: nn.Module) -> Iterator[Tensor]:
    """Its own frequencies; of one that has some for each type of layer, those of full attention,
    which are the ones that the keys state.
    """
    for name, buffer in module.named_buffers(recurse=False):
        if name in ("inv_freq", "full_attention_inv_freq"):
            yield buffer


def _makes(module: nn.Module, config: PreTrainedConfig, wanted: Tensor) -> bool:
    """Whether a module of its type, made for `config`, has the frequencies `wanted`."""
    try:
        made: nn.Module = type(module)(config)
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return False
    return all(
        found.shape == wanted.shape and torch.allclose(found, wanted, rtol=_CLOSE, atol=0)
        for found in _frequencies(made)
    )


def _plain(header: GGUFHeader, config: Any) -> Tensor:
    """Frequencies without divisors, computed as transformers does."""
    base = header.of_model("rope.freq_base")
    size = header.of_model("rope.dimension_count") or header.of_model("attention.key_length")
    size = config.hidden_size // config.num_attention_heads if size is None else size
    base = _DEFAULT_BASE if base is None else base
    if not isinstance(size, int) or not 2 <= size <= 1 << 16 or size % 2:
        raise InputError(f"{header.path}: rope.dimension_count must be an even size, got {size!a}")
    if not isinstance(base, int | float) or not 1 <= base < math.inf:
        raise InputError(f"{header.path}: rope.freq_base must be from 1 on, got {base!a}")
    return 1.0 / (base ** (torch.arange(0, size, 2, dtype=torch.int64).float() / size))


def _divisors(header: GGUFHeader) -> Tensor:
    """What the plain frequencies are divided by [n / 2], or [1] if all by the same."""
    kind, factor = header.of_model("rope.scaling.type"), header.of_model("rope.scaling.factor")
    factor = header.of_model("rope.scale_linear") if factor is None else factor
    if kind not in (None, "none", "linear"):
        raise UnsupportedError(
            f"{header.path}: rope.scaling.type {kind!a} is not supported",
            hint="use a safetensors checkpoint of the model",
        )
    if kind == "none" or factor is None:
        factor = 1.0
    values: Sequence[float] = header.floats(FREQS) if FREQS in header.tensors else (1.0,)
    if not isinstance(factor, int | float) or not all(0 < v < math.inf for v in (factor, *values)):
        raise InputError(f"{header.path}: rotary frequencies can be divided by positive numbers")
    return torch.tensor(values, dtype=torch.float32) * factor


def _candidates(stated: Any, divisors: Tensor, plain: Tensor) -> Iterator[RopeParameters]:
    """Parameters that may make the frequencies, the simplest first. `stated` are those that
    transformers has read from the file.
    """
    first = _rounded(float(divisors[0]))
    alike = torch.allclose(divisors, torch.tensor(first), rtol=_CLOSE, atol=0)
    if alike and first == 1:
        yield stated
        return
    if not isinstance(stated, dict) or any(isinstance(one, dict) for one in stated.values()):
        return  # one set for each type of layer: which of them is divided is not known
    if alike:
        yield {**stated, "rope_type": "linear", "factor": first}
        return
    for factor, low, high, positions in (*_PUBLISHED, *_fitted(divisors, plain)):
        yield {
            **stated,
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": positions,
        }


def _fitted(divisors: Tensor, plain: Tensor) -> Iterator[tuple[float, float, float, int]]:
    """Parameters as those of Llama 3.1 that give the divisors, where any do.

    Frequencies between two wavelengths are divided by `1 / ((1 - s) / factor + s)`, and `s` grows
    linearly with the frequency: two numbers, from the line through the points. Three parameters
    make them, of which one is free: `low_freq_factor` is 1 if the others are then round.
    """
    largest = float(divisors.max())
    factor = _rounded(largest)
    inner = (divisors > 1 + _CLOSE) & (divisors < largest * (1 - _CLOSE))
    if largest <= 1 or int(inner.sum()) < 2:
        return
    shares = (1 / divisors[inner].double() - 1 / factor) / (1 - 1 / factor)
    turns = plain[inner].double() / (2 * math.pi)
    slope = float(((turns - turns.mean()) * (shares - shares.mean())).sum() / turns.var() / (
        len(turns) - 1
    ))  # fmt: skip
    at_zero = float(shares.mean() - slope * turns.mean())
    if slope <= 0 or at_zero >= 0:
        return
    high = 1 - 1 / at_zero
    positions = slope * (high - 1)
    whole = max(1, round(positions))
    yield factor, 1.0, _rounded(high, 3), whole
    low = whole / positions
    yield largest, low, low * high, whole


def _rounded(value: float, digits: int = _DIGITS) -> float:
    return float(f"{value:.{digits}g}")
