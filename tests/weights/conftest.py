"""A small checkpoint of tensors alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ollm_core.checkpoint.safetensors import Checkpoint, open_checkpoint


@pytest.fixture
def saved(tmp_path: Path) -> tuple[dict[str, torch.Tensor], Checkpoint]:
    """Nine tensors of odd sizes in one file, and where they are."""
    torch.manual_seed(0)
    tensors = {f"t{i}": torch.randn(37 * (i + 1), 129) for i in range(9)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    return tensors, open_checkpoint(tmp_path)
