"""Names of parameters in a model, and names, shapes and dtypes of tensors in its checkpoint."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from ollm_conformance.forms import as_published
from ollm_conformance.models import meta_model
from ollm_conformance.subject import Subject
from ollm_core import Config

_INTEGERS = {"torch.uint8": "U8", "torch.int8": "I8", "torch.int32": "I32", "torch.int64": "I64"}
Form = tuple[str, tuple[int, ...]]
"""safetensors dtype name and shape of a tensor."""


@dataclass(frozen=True, slots=True)
class Names:
    """What transformers makes of one config.json, nothing of it computed."""

    parameters: Mapping[str, tuple[int, ...]]
    """Shape of each parameter, and of each buffer that is stored, a tied head included."""
    forms: Mapping[str, Form]
    """dtype and shape of each tensor of the checkpoint as the family has it and an adapter is told
    of it, decoded where it is packed, a tied head left out. Empty for the dtype of floats, which
    config.json does not fix.
    """
    published: Mapping[str, Form]
    """The same of each stored tensor, packed as config.json says."""
    ignored: tuple[str, ...]
    """Patterns of the names of tensors that transformers itself ignores in a checkpoint."""

    def stored(self, dtype: str) -> dict[str, Form]:
        """`published`, with floats in `dtype`, as safetensors names it."""
        return {name: (kind or dtype, shape) for name, (kind, shape) in self.published.items()}

    def ignores(self, tensor: str) -> bool:
        """Whether transformers would pass over a tensor without a word."""
        return any(re.search(pattern, tensor) for pattern in self.ignored)


def names_of(config: Config, model: PreTrainedModel | None = None) -> Names:
    """See Names; `model` is that of `meta_model`, if there is one already. Raises whatever
    transformers does for a config that makes no model.
    """
    model = model or meta_model(config)
    parameters = model.state_dict()  # and buffers that are stored
    state = {name: p.data for name, p in model.named_parameters()}  # each shared one once
    buffers = dict(model.named_buffers())
    state |= {name: buffers[name] for name in parameters if name in buffers}
    plain = revert_weight_conversion(model, state)
    ignored: Iterable[str] = model._keys_to_ignore_on_load_unexpected or ()
    return Names(
        {name: tuple(p.shape) for name, p in parameters.items()},
        _forms(plain),
        _forms(as_published(config, plain)),
        tuple(ignored),
    )


def _forms(tensors: Mapping[str, Tensor]) -> dict[str, Form]:
    return {
        name: ("" if value.is_floating_point() else _INTEGERS[str(value.dtype)], tuple(value.shape))
        for name, value in tensors.items()
    }


def kept_names(subject: Subject, config: Config) -> Names:
    """As `names_of`, asked of transformers once for a test class: large models take a while."""
    key = "names", json.dumps(dict(config), sort_keys=True)
    found: Names = subject.once(key, lambda: names_of(config))
    return found


def one_of_each(names: Iterable[str]) -> list[str]:
    """Names that differ in more than numbers, the last of each kind."""
    return sorted({re.sub(r"\d+", "0", name): name for name in sorted(names)}.values())
