"""Makes a safetensors model from a GGUF file: weights unpacked, config, tokenizer and chat
template.

The unpacking is transformers' own, with the whole model in host memory. Quantised weights keep the
values that they were quantised to.
"""

from __future__ import annotations

import errno
import importlib.util
import os
import shutil
from pathlib import Path
from typing import Any

from ollm_core.checkpoint import open_checkpoint
from ollm_core.errors import DoesNotFitError, InputError, OllmError, UnsupportedError
from ollm_core.scratch import leftovers, make_directory, reap
from ollm_core.user_files import check_writable_directory

DTYPES = ("float32", "float16", "bfloat16")
_MAGIC = b"GGUF"


def import_gguf(
    gguf_file: Path, out: Path, dtype: str = "bfloat16", *, force: bool = False
) -> Path | None:
    """Write the model in `gguf_file` to the directory `out`, which appears only once it is whole.

    `force` moves what has the name `out` aside, and the new name of that is returned; nothing is
    ever deleted. Raises InputError for a file that is not a whole GGUF, an `out` that is taken, or
    a dtype that is not one of `DTYPES`; UnsupportedError if a package for GGUF is missing;
    DoesNotFitError if the disk is full.
    """
    if dtype not in DTYPES:
        raise InputError(f"{dtype!r} is not one of {', '.join(DTYPES)}")
    _check_file(gguf_file)
    taken = out.is_symlink() or (any(out.iterdir()) if out.is_dir() else os.path.lexists(out))
    if taken and not force:
        raise InputError(f"{out} exists", hint="choose another --out, or move it aside by --force")
    for package in ("gguf", "accelerate"):  # transformers asks for both
        if importlib.util.find_spec(package) is None:
            raise UnsupportedError(
                f"reading GGUF files needs the {package} package",
                hint="pip install 'ollm-core[gguf]'",
            )
    name = f".{out.name}.", ".import"
    check_writable_directory(out.parent)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        reap(leftovers(out.parent, *name), shutil.rmtree)
        made = make_directory(out.parent, *name)
    except OSError as error:
        raise InputError(f"cannot write to {out.parent}: {error.strerror}") from error
    scratch = made.path
    try:
        _convert(gguf_file, scratch, dtype)
        open_checkpoint(scratch)
        scratch.chmod(out.parent.stat().st_mode & 0o777)
        aside = _move_aside(out) if taken else None
        scratch.rename(out)  # replaces an empty directory
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        os.close(made.descriptor)
    return aside


def _check_file(gguf_file: Path) -> None:
    try:
        with gguf_file.open("rb") as file:
            magic = file.read(len(_MAGIC))
    except OSError as error:
        raise InputError(f"cannot read {gguf_file}: {error.strerror}") from error
    if magic != _MAGIC:
        raise InputError(f"{gguf_file} is not a GGUF file: it starts with {magic!r}")


def _convert(gguf_file: Path, directory: Path, dtype: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from ollm_core.text.tokenizer import refuse_code

    refuse_code(gguf_file.parent)
    source: dict[str, Any] = {
        "pretrained_model_name_or_path": str(gguf_file.parent),
        "gguf_file": gguf_file.name,
        "local_files_only": True,
    }
    try:
        model = AutoModelForCausalLM.from_pretrained(
            **source,
            trust_remote_code=False,
            dtype=getattr(torch, dtype),
            quantization_config=GgufConfig(dequantize=True),
        )
        tokenizer = AutoTokenizer.from_pretrained(**source, trust_remote_code=False)
    except Exception as error:
        cause = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise InputError(
            f"{gguf_file} is truncated, damaged or of an unknown kind: {cause}"
        ) from error
    try:
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    except Exception as error:  # safetensors has its own error for a failed write
        cause = (str(error).splitlines() or [""])[0] or type(error).__name__
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in cause:
            raise DoesNotFitError(f"the disk of {directory.parent} is full: {cause}") from error
        raise OllmError(f"cannot write to {directory.parent}: {cause}") from error


def _move_aside(path: Path) -> Path:
    """Give `path` the first free name of the form NAME.old, NAME.old2, ... and return it."""
    number = 1
    while (aside := path.with_name(f"{path.name}.old{number if number > 1 else ''}")).exists():
        number += 1
    path.rename(aside)
    return aside
