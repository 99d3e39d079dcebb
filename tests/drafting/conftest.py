"""Tiny models of three families, for drafts."""

from __future__ import annotations

import pytest
import torch
from draft_models import gpt_oss, qwen3_next
from transformers import (
    AutoModelForCausalLM,
)


@pytest.fixture
def make(make_llama, tmp_path):
    """Writes a tiny random model of a family and returns its directory."""

    def make_one(family, seed=0):
        directory = tmp_path / f"{family}-{seed}"
        if family == "llama":
            return make_llama(name=directory.name, seed=seed)
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config({"gpt": gpt_oss, "qwen": qwen3_next}[family]())
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(directory)
        return directory

    return make_one
