"""The built-in weight codec keeps the contract."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

import ollm
from ollm_conformance import CodecConformance
from ollm_core.convert.compress import convert
from ollm_core.weights.formats import byte_planes
from ollm_core.weights.formats.compressed import (
    FORMAT,
    FORMAT_KEY,
    compressed_weights,
    low_name,
    zstd_name,
)


def two_planes(name, tensor):
    """The stored tensors of one that is compressed, however little it gains."""
    dtype = {torch.bfloat16: "BF16", torch.float16: "F16"}[tensor.dtype]
    numbers = tensor.reshape(-1).view(torch.uint8).view(*tensor.shape, 2)
    high = numbers[..., 1].contiguous().view(-1).numpy()
    cuts = range(0, len(high), byte_planes.FRAME)
    frames = [byte_planes.compress_frame(high[i : i + byte_planes.FRAME]) for i in cuts]
    packed = b"".join(byte_planes.join_frames(frames, len(high)))
    return {
        low_name(name, dtype): numbers[..., 0].contiguous(),
        zstd_name(name, dtype): torch.frombuffer(bytearray(packed), dtype=torch.uint8),
    }


class TestCompressed(CodecConformance):
    """Two planes, one of them compressed."""

    codec = compressed_weights
    dtypes = ("BF16", "F16")
    edges = (byte_planes.FRAME, 2 * byte_planes.FRAME)

    @classmethod
    def write(cls, tensors, directory):
        stored = {}
        for name, tensor in tensors.items():
            stored |= two_planes(name, tensor) if tensor.numel() else {name: tensor}
        save_file(stored, directory / "model.safetensors", {FORMAT_KEY: FORMAT})

    @classmethod
    def is_checked(cls, stored):
        return stored.endswith(".zstd")

    @classmethod
    @contextmanager
    def models(cls):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=64, hidden_size=256, intermediate_size=384, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2,
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
            plain, packed = Path(name, "plain"), Path(name, "packed")
            LlamaForCausalLM(config).bfloat16().save_pretrained(plain)
            assert convert(plain, packed).num_compressed
            yield tuple(
                stack.enter_context(ollm.load(one, device="cpu")) for one in (plain, packed)
            )
