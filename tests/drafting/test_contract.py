"""The draft sources of core keep the contract."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ollm_conformance import DrafterConformance
from ollm_core.device.memory import SHARED
from ollm_core.drafting.lookup import LookupDrafter
from ollm_core.loader import Runtime, build_drafter, inspect_directory
from ollm_core.memory.accounts import Accounts
from ollm_core.plugins.registry import Registry


class TestLookup(DrafterConformance):
    """What followed the last tokens before."""

    @classmethod
    def open_drafter(cls, request):
        return LookupDrafter()


class TestModelDrafter(DrafterConformance):
    """A small model in memory."""

    directory: Path

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def checkpoint(cls):
        """A random Llama with peaked logits."""
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=cls.vocab_size, hidden_size=64, intermediate_size=112, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.2)
        with tempfile.TemporaryDirectory() as name:
            cls.directory = Path(name)
            model.save_pretrained(name)
            yield

    @classmethod
    def open_drafter(cls, request):
        whole = Accounts(request.device_account, request.host_account)

        def set_aside(kind, more):
            whole.device.reserve(kind, more.device)
            with ExitStack() as stack:
                stack.callback(whole.device.release, kind, more.device)
                whole.host.reserve(kind, more.host)
                stack.pop_all()

        runtime = Runtime(Registry.discover(), torch.device("cpu"), "auto", "fast", "auto", SHARED)
        spec = inspect_directory(runtime, cls.directory)
        return build_drafter(runtime, spec, whole, set_aside)
