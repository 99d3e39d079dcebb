"""Converts a GGUF file to a safetensors model: weights, config, tokenizer and chat template.

The unpacking is transformers' own, with the whole model in host memory. Quantised weights keep the
values that they were quantised to. What of the file does not come out in the model is named, and
nothing is written.
"""

from __future__ import annotations

import errno
import importlib.util
import os
import shutil
from pathlib import Path
from typing import Any

from ollm_core.checkpoint.safetensors import open_checkpoint
from ollm_core.convert.gguf.header import GGUFHeader, check_magic, read_header
from ollm_core.errors import DoesNotFitError, InputError, OllmError, UnsupportedError
from ollm_core.files.paths import check_writable_directory
from ollm_core.files.scratch import leftovers, make_directory, reap
from ollm_core.files.untrusted_json import show
from ollm_core.values import DTYPES


def import_gguf(
    gguf_file: Path, out: Path, dtype: str = "bfloat16", *, force: bool = False
) -> Path | None:
    """Write the model in `gguf_file` to the directory `out`, which appears only once it is whole.

    `force` moves what has the name `out` aside, and the new name of that is returned; nothing is
    ever deleted. Raises InputError for a file that is not a whole GGUF, an `out` that is taken, or
    a dtype that is not one of `DTYPES`; UnsupportedError if a package for GGUF is missing, or for a
    key or tensor of the file that would not be in the model; DoesNotFitError if the disk is full.
    """
    if dtype not in DTYPES:
        raise InputError(f"{dtype!r} is not one of {', '.join(DTYPES)}")
    check_magic(gguf_file)
    taken = out.is_symlink() or (any(out.iterdir()) if out.is_dir() else os.path.lexists(out))
    if taken and not force:
        raise InputError(f"{out} exists", hint="choose another --out, or move it aside by --force")
    for package in ("gguf", "accelerate"):  # transformers asks for both
        if importlib.util.find_spec(package) is None:
            raise UnsupportedError(
                f"reading GGUF files needs the {package} package",
                hint="pip install 'ollm-core[gguf]'",
            )
    check_writable_directory(out.parent)
    header = read_header(gguf_file)
    name = f".{out.name}.", ".import"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        reap(leftovers(out.parent, *name), shutil.rmtree)
        made = make_directory(out.parent, *name)
    except OSError as error:
        raise InputError(f"cannot write to {out.parent}: {error.strerror}") from error
    scratch = made.path
    try:
        _convert(header, scratch, dtype)
        open_checkpoint(scratch)
        scratch.chmod(out.parent.stat().st_mode & 0o777)
        aside = _move_aside(out) if taken else None
        scratch.rename(out)  # replaces an empty directory
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        os.close(made.descriptor)
    return aside


def _convert(header: GGUFHeader, directory: Path, dtype: str) -> None:
    from ollm_core.convert.gguf.model import check_config, check_keys, check_tensors
    from ollm_core.convert.gguf.rope import set_rope
    from ollm_core.convert.gguf.tokenizer import (
        check_tokenizer,
        correct_tokenizer,
        drop_foreign_tokens,
        stopping_tokens,
    )

    check_keys(header)
    model, loading_info, tokenizer = _open(header, directory, dtype)
    check_config(header, model)
    check_tensors(header, model, loading_info)
    set_rope(header, model)
    correct_tokenizer(header, tokenizer)
    check_tokenizer(header, tokenizer)
    ends = stopping_tokens(header, model.generation_config.eos_token_id)
    model.generation_config.eos_token_id = ends
    try:
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        drop_foreign_tokens(header, directory / "tokenizer.json")
    except Exception as error:  # safetensors has its own error for a failed write
        cause = _cause(error)
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in cause:
            raise DoesNotFitError(f"the disk of {directory.parent} is full: {cause}") from error
        raise OllmError(f"cannot write to {directory.parent}: {cause}") from error


def _open(header: GGUFHeader, directory: Path, dtype: str) -> tuple[Any, dict[str, Any], Any]:
    """The model of the file, what transformers says of the loading, and the tokenizer.

    The file is opened by a link in a directory of its own: transformers would also take configs,
    tokenizers and adapters that lie beside it.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    alone = directory / ".source"
    alone.mkdir()
    link = alone / "model.gguf"
    source: dict[str, Any] = {
        "pretrained_model_name_or_path": str(alone),
        "gguf_file": link.name,
        "local_files_only": True,
    }
    try:
        link.symlink_to(header.path.resolve())
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            **source,
            trust_remote_code=False,
            dtype=getattr(torch, dtype),
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in the info, and named from there
        )
        tokenizer = AutoTokenizer.from_pretrained(**source, trust_remote_code=False)
    except Exception as error:
        cause = _cause(error)
        raise InputError(
            f"{header.path} is truncated, damaged or of an unknown kind: {cause}"
        ) from error
    finally:
        shutil.rmtree(alone)
    return *loaded, tokenizer


def _cause(error: Exception) -> str:
    """Its first line, safe on a terminal: libraries put names from the file into it."""
    line = (str(error).splitlines() or [""])[0] or type(error).__name__
    return line if line.isprintable() else show(line)


def _move_aside(path: Path) -> Path:
    """Give `path` the first free name of the form NAME.old, NAME.old2, ... and return it."""
    number = 1
    while (aside := path.with_name(f"{path.name}.old{number if number > 1 else ''}")).exists():
        number += 1
    path.rename(aside)
    return aside
