"""Says what a directory holds when it is no plain checkpoint, from the names of its files.

The one place that knows other forms of weights. It opens none of these files: a pickle runs code.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from ollm_core.errors import CheckpointError, ConfigError
from ollm_core.files.untrusted_json import show

LORA_CONFIG = "adapter_config.json"
_MAX_ENTRIES = 10_000
"""Of a directory, looked at: a model has a few hundred files at most."""
_FETCH = "fetch the model in the form that transformers writes, for instance with `ollm pull`"


@dataclass(frozen=True, slots=True)
class _Form:
    """Weights in another form: the file that shows it, what that holds, and what to do about it."""

    file: str
    """A regular expression, for a whole name."""
    holds: str
    hint: str


_LORA = _Form(
    r"adapter_(config\.json|model\.(safetensors|bin))",
    "is of a LoRA adapter, which is no model by itself",
    "merge it into its base model (merge_and_unload of peft), save that, and open it",
)
_FORMS = (  # the first that fits is told
    _LORA,
    _Form(
        r"model-\d+-of-\d+\.safetensors",
        "is one of several files, and model.safetensors.index.json is not there to list them",
        "fetch the index too; if this is the only file, rename it to model.safetensors",
    ),
    _Form(
        r"consolidated.*\.(safetensors|pth)",
        "holds weights under their author's own names, not those of transformers",
        _FETCH,
    ),
    _Form(
        r".*\.(bin|pt|pth|ckpt|pkl)",
        "holds pickled weights, which are never opened: a pickle can run code",
        "where you trust it, open it with transformers and save it again by save_pretrained, "
        "which writes safetensors",
    ),
    _Form(r".*\.gguf", "is a GGUF file", "`ollm import FILE` makes a model of it"),
    _Form(r".*\.(h5|msgpack|onnx)", "holds weights of another framework", _FETCH),
    _Form(r"model_index\.json", "is of a diffusion pipeline", "give a language model"),
    _Form(
        r".*\.safetensors",
        "is not the name under which transformers looks for weights",
        "if it is the whole model, rename it to model.safetensors",
    ),
)


def no_weights(directory: Path, wanted: Iterable[str]) -> CheckpointError:
    """The error for a directory that has no file of the names `wanted`: what it has in place of
    them.
    """
    told = _told(directory, _FORMS)
    neither = f"{directory}: neither {' nor '.join(wanted)} is there"
    if told is None:
        return CheckpointError(neither, hint="give the directory of a safetensors checkpoint")
    return CheckpointError(f"{neither}; {told[0]}", hint=told[1])


def no_config(path: Path) -> ConfigError:
    """The error for a directory without the config file `path`: what it is in place of a model."""
    told = _told(path.parent, (_LORA, *(form for form in _FORMS if form.file.endswith("gguf"))))
    if told is None:
        return ConfigError(f"{path}: no such file", hint="give the directory of a model")
    return ConfigError(f"{path}: no such file; {told[0]}", hint=told[1])


def check_alone(directory: Path) -> None:
    """Raises CheckpointError for a model with a LoRA adapter in its own directory, which
    transformers applies to it where peft is installed, and does not where it is not.
    """
    if os.path.lexists(directory / LORA_CONFIG):
        raise CheckpointError(
            f"{directory}: {LORA_CONFIG} is there: the model has a LoRA adapter beside it, which "
            "would not be applied",
            hint=f"merge it (merge_and_unload of peft); or move {LORA_CONFIG} away, if the model "
            "is wanted without it",
        )


def _told(directory: Path, forms: Iterable[_Form]) -> tuple[str, str] | None:
    """What shows the first of `forms` that is there, and a hint."""
    try:
        with os.scandir(directory) as entries:
            names = sorted(entry.name for entry in islice(entries, _MAX_ENTRIES))
    except OSError:
        return None
    return _first(names, forms)


def other_form(names: Iterable[str]) -> str:
    """What shows the first other form of weights among the `names` of files, in words; empty if
    none does.
    """
    told = _first(sorted(names), _FORMS)
    return told[0] if told else ""


def _first(names: Sequence[str], forms: Iterable[_Form]) -> tuple[str, str] | None:
    for form in forms:
        for name in names:
            if re.fullmatch(form.file, name):
                return f"{show(name)} {form.holds}", form.hint
    return None
