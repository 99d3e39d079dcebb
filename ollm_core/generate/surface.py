"""Methods that a streamed model inherits from transformers and torch: which work, and which raise.

Its base classes promise much that is not so here: there are no parameters to train, move or save.
What works is listed; anything else raises, also what a later transformers adds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NoReturn, Self, TypeVar

import torch
from torch import Tensor

from ollm_core.errors import UnsupportedError

_C = TypeVar("_C", bound=type)

INHERITED = frozenset(
    {
        "generate",
        "compute_transition_scores",
        "loss_function",
        "register_forward_hook",
        "register_forward_pre_hook",
        # asked by transformers' own code, and answered right
        "extra_repr",
        "get_correct_attn_implementation",
        "get_correct_experts_implementation",
        "is_remote_code",
    }
)
"""Functions and properties of transformers and torch that work here as they are."""

_INSTEAD = {
    "generate_batch": "pass a batch that is padded on the left to generate",
    "from_pretrained": "open it with ollm.load",
    "load_custom_generate": "generate takes a function of yours as custom_generate",
    "parameters": "weight_bytes is their size, device and dtype are attributes of the model",
    "save_pretrained": "the checkpoint is where it was opened, and unchanged",
}
_ELSEWHERE = "load the checkpoint with transformers for that"


def only_what_works(cls: _C) -> _C:
    """A class decorator: every public function and property that `cls` inherits from transformers
    or torch and that is not in INHERITED raises UnsupportedError. What is plain data stays.
    """
    for name in dir(cls):
        owner = next((base for base in cls.__mro__ if name in vars(base)), cls)
        foreign = owner.__module__.partition(".")[0] in ("torch", "transformers")
        if name.startswith("_") or name in INHERITED or not foreign:
            continue
        found = vars(owner)[name]
        if isinstance(found, property):
            setattr(cls, name, property(_refusal(name)))
        elif isinstance(found, classmethod | staticmethod):
            setattr(cls, name, staticmethod(_refusal(name)))
        elif callable(found) and not isinstance(found, type | TypeVar):
            setattr(cls, name, _refusal(name))
    return cls


def _refusal(name: str) -> Callable[..., NoReturn]:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise UnsupportedError(
            f"a streamed model has no {name}", hint=_INSTEAD.get(name, _ELSEWHERE)
        )

    refuse.__name__ = name
    return refuse


class FixedModel(ABC):
    """Answers to callers that prepare any model in the same way: what is so already is fine."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where it computes."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """What it computes in."""

    @classmethod
    def can_generate(cls) -> bool:
        """Asked by GenerationMixin."""
        return True

    def get_experts_implementation(self) -> dict[str, str | None]:
        """Asked by GenerationMixin; there is none to choose."""
        return {}

    def eval(self) -> Self:
        """It only ever infers."""
        return self

    def train(self, mode: bool = True) -> Self:
        """Raises UnsupportedError for True."""
        if mode:
            raise UnsupportedError("a streamed model cannot be trained", hint=_ELSEWHERE)
        return self

    def tie_weights(self, *_: Any, **__: Any) -> None:
        """What the checkpoint ties is tied since the model was opened."""
        return

    def to(self, *arguments: Any, **options: Any) -> Self:
        """As in torch, for the device and the dtype that it has. Raises UnsupportedError for
        another.
        """
        for value in (*arguments, *options.values()):
            if not self._is_so(value):
                raise UnsupportedError(
                    f"to {value}: a streamed model stays on {self.device} in "
                    f"{str(self.dtype).removeprefix('torch.')}",
                    hint="open it with ollm.load(..., device=, dtype=)",
                )
        return self

    def _is_so(self, value: Any) -> bool:
        """Whether an argument of `to` asks for nothing new."""
        if value is None or isinstance(value, bool | torch.memory_format):
            return True
        if isinstance(value, torch.dtype):
            return value == self.dtype
        if isinstance(value, Tensor):
            return self._is_so(value.dtype) and self._is_so(value.device)
        wanted = torch.device(value)
        index = self.device.index or 0
        return wanted.type == self.device.type and wanted.index in (None, index)
