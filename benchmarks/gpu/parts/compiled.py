"""Whether compiling a layer's decode step, or a CUDA graph of it, would pay."""

from __future__ import annotations

import shutil
import sysconfig
from pathlib import Path

import torch

from benchmarks.decode import compiled as layers
from benchmarks.gpu.parts.work import OutOfTime, Tell, Work


def run(work: Work, tell: Tell, _: str = "") -> None:
    """A finding for each shape. Raises OutOfTime."""
    if missing := _missing():
        tell("compiler", f"nothing was compiled: {missing}")
        return
    names = list(layers.SHAPES)[:1] if work.small else list(layers.SHAPES)
    for name in names:
        if work.seconds_left < 8:
            raise OutOfTime(f"a layer of {name} was not compiled")
        torch.compiler.reset()
        found = layers.compare(layers.SHAPES[name], torch.bfloat16, work.device, rounds=3)
        tell(name, layers.told(found), **found)


def _missing() -> str:
    """What there must be to compile, beside torch."""
    if not any(map(shutil.which, ("cc", "gcc", "clang"))):
        return "there is no C compiler here"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "Python's headers are not here"
    return ""
