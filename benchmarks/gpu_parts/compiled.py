"""Whether compiling a layer's decode step, or a CUDA graph of it, would pay."""

from __future__ import annotations

import compiled as layers
import torch

from gpu_parts.work import OutOfTime, Tell, Work


def run(work: Work, tell: Tell, _: str = "") -> None:
    """A finding for each shape. Raises OutOfTime."""
    names = list(layers.SHAPES)[:1] if work.small else list(layers.SHAPES)
    for name in names:
        if work.seconds_left < 8:
            raise OutOfTime(f"a layer of {name} was not compiled")
        torch.compiler.reset()
        found = layers.compare(layers.SHAPES[name], torch.bfloat16, work.device, rounds=3)
        tell(name, layers.told(found), **found)
