"""Flash attention without its package and without a GPU."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType

import flash_reference as reference
import pytest
import torch


@pytest.fixture(scope="module")
def stand_ins() -> Iterator[None]:
    """The reference in the place of the package, and of torch's operator on a CPU, which has none
    there.
    """
    package = ModuleType("flash_attn")
    package.flash_attn_func = reference.flash_attn_func
    here = pytest.MonkeyPatch()
    here.setitem(sys.modules, "flash_attn", package)
    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", reference.flash_attention_forward, "CPU")
    yield
    library._destroy()
    here.undo()
