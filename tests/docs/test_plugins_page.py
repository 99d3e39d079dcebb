"""The parts of docs/plugins.md keep the contracts of the conformance suite."""

from __future__ import annotations

import re
import types
from pathlib import Path

import torch
from safetensors.torch import save_file

from ollm_conformance import (
    ByteSourceConformance,
    CodecConformance,
    DrafterConformance,
    KVStoreConformance,
)
from ollm_core import KVGeometry, KVRequest, MemoryAccount

PAGE = (Path(__file__).parents[2] / "docs" / "plugins.md").read_text()


def factory(hook, name):
    """What the example of a hook offers under a name."""
    section = PAGE.split(f"\n## {hook}\n")[1].split("\n## ")[0]
    module = types.ModuleType(f"example_{hook}")
    exec(re.search(r"```python\n(.*?)```", section, re.DOTALL)[1], vars(module))
    return getattr(module, hook)()[name]


class TestCheckedStore(KVStoreConformance):
    """Host memory with checksums."""

    num_examples = 5
    make = staticmethod(factory("ollm_kv_stores", "checked"))

    @classmethod
    def open_store(cls, shape, account, directory):
        geometry = KVGeometry(shape.kinds, shape.dtype, torch.device("cpu"), shape.block_size)
        device = MemoryAccount("device memory", 0)
        return cls.make(KVRequest(geometry, device, account, None, lambda: "0" * 64))


class TestBufferedSource(ByteSourceConformance):
    """Reads through the page cache."""

    over_2gib = False
    make = staticmethod(factory("ollm_reading_engines", "buffered"))

    @classmethod
    def open_source(cls, paths):
        return cls.make(paths)


class TestBytePlanes(CodecConformance):
    """High and low bytes apart."""

    codec = staticmethod(factory("ollm_weight_codecs", "byte-planes"))

    @classmethod
    def write(cls, tensors, directory):
        stored = {}
        for name, tensor in tensors.items():
            planes = tensor.reshape(-1).view(torch.uint8).view(*tensor.shape, 2)
            stored[f"{name}.low"] = planes[..., 0].contiguous()
            stored[f"{name}.high"] = planes[..., 1].contiguous()
        save_file(stored, directory / "model.safetensors")


class TestCountingDrafter(DrafterConformance):
    """Goes on counting."""

    make = staticmethod(factory("ollm_draft_sources", "counting"))

    @classmethod
    def open_drafter(cls, request):
        return cls.make(request)
