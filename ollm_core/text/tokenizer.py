"""Opens a checkpoint's tokenizer, which is transformers' own, without running code of the
checkpoint or asking anything.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ollm_core.checkpoint.safetensors import MAX_CONFIG_BYTES, read_small
from ollm_core.errors import ConfigError
from ollm_core.files.untrusted_json import parse_object, show

MAX_VOCABULARY_BYTES = 64 << 20
"""Of each file with a vocabulary; the largest known has 33 MB."""
MAX_TEMPLATE_BYTES = 1 << 20

_VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)
_CONFIGS = ("special_tokens_map.json", "added_tokens.json", "chat_template.json")
_TEMPLATES = ("*.jinja", "additional_chat_templates/*.jinja")
_CONFIG = "tokenizer_config.json"


def open_tokenizer(directory: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer in `directory`, or None if it has none: token ids are enough to run a model.

    With `trust_remote_code`, and only then, Python code in `directory` is run where
    tokenizer_config.json asks for it. Nothing is fetched. Raises ConfigError for a tokenizer that
    is damaged, of an unknown kind, larger than any known, or that needs code which is not trusted.
    """
    if not any((directory / name).is_file() for name in _VOCABULARIES):
        return None
    _check_sizes(directory)
    _refuse_code(directory, trust_remote_code=trust_remote_code)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=trust_remote_code
        )
        only_added = len(tokenizer) <= len(tokenizer.added_tokens_decoder)
    except Exception as error:
        raise ConfigError(
            f"{directory}: the tokenizer cannot be opened: {' '.join(str(error).split())[:300]}"
        ) from error
    if only_added:  # what transformers makes of a class whose files are not there
        raise ConfigError(
            f"{directory}: the tokenizer has no vocabulary",
            hint="add the files that its class reads, or tokenizer.json",
        )
    return tokenizer


def _refuse_code(directory: Path, *, trust_remote_code: bool = False) -> None:
    """Raises ConfigError if transformers would open something else than a tokenizer for that of
    `directory`, or would need code of the checkpoint, which may give other tokens than a class of
    its own: without `trust_remote_code` that is refused.
    """
    path = directory / _CONFIG
    config = _read(path)
    name = _check_class(path, config)
    _check_class(directory / "config.json", _read(directory / "config.json"))
    code = config.get("auto_map")
    if isinstance(code, dict):
        code = code.get("AutoTokenizer")
    if code is None or trust_remote_code or (name is not None and _known(name)):
        return
    raise ConfigError(
        f"{path}: the tokenizer is code of the checkpoint, {show(code)}, which is not run",
        hint="read that code first; --trust-remote-code (trust_remote_code=True) then runs it",
    )


def _check_sizes(directory: Path) -> None:
    vocabularies = [directory / name for name in _VOCABULARIES]
    configs = [directory / name for name in _CONFIGS]
    templates = [path for pattern in _TEMPLATES for path in directory.glob(pattern)]
    for paths, limit in (
        (vocabularies, MAX_VOCABULARY_BYTES),
        (configs, MAX_CONFIG_BYTES),
        (templates, MAX_TEMPLATE_BYTES),
    ):
        for path in paths:
            if path.is_file() and (size := path.stat().st_size) > limit:
                raise ConfigError(f"{path}: need at most {limit} bytes, have {size}")


def _read(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; an empty one if it is not there."""
    if not path.exists():
        return {}
    try:
        return parse_object(read_small(path, MAX_CONFIG_BYTES, ConfigError))
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error


def _check_class(path: Path, config: dict[str, Any]) -> str | None:
    """The `tokenizer_class` of a file, if it has one.

    transformers would open anything of its own by that name: a model with pickled weights, or
    a class that asks whether to run code. Raises ConfigError for what is no tokenizer.
    """
    name = config.get("tokenizer_class")
    if name is None:
        return None
    if not isinstance(name, str):
        raise ConfigError(f"{path}: `tokenizer_class` must be text, got {show(name)}")
    for one in _known(name):
        if not (isinstance(one, type) and issubclass(one, PreTrainedTokenizerBase)):
            raise ConfigError(f"{path}: `tokenizer_class` {show(name)} is no tokenizer")
    return name


def _known(name: str) -> list[object]:
    """What transformers has under the name of a tokenizer class."""
    stem = name.removesuffix("Fast")
    offered = dir(transformers)
    return [getattr(transformers, one) for one in {name, stem, f"{stem}Fast"} if one in offered]
