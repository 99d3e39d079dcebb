"""Promise 1: bit for bit what transformers gives un-offloaded, with the same chunking."""

from __future__ import annotations

import pytest
import torch

import ollm
from ollm_conformance.subject import greedy
from ollm_core.device.dtypes import DTYPES

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}

TINY_CASES = [
    # dtype, chunk size, KV tier, reading engine, tied head
    ("float32", 64, "disk", "direct", False),
    ("float32", 512, "device", "mmap", True),
    ("float16", 100, "host", "direct", True),
    ("float16", 512, "disk", "mmap", False),
    ("bfloat16", 64, "device", "direct", False),
    ("bfloat16", 333, "disk", "direct", True),
]


@pytest.mark.parametrize(("dtype", "chunk_size", "kv", "reader", "tied"), TINY_CASES)
def test_tiny_logits_are_bitwise(
    make_llama, reference, ids, tmp_path, dtype, chunk_size, kv, reader, tied
):
    """Every logit of a prompt of 1,100 tokens is that of transformers with the same chunk size."""
    directory = make_llama(DTYPES[dtype], tie_word_embeddings=tied)
    prompt = ids(1100)
    expected = reference(directory, DTYPES[dtype]).run(prompt, chunk_size)
    with ollm.load(
        directory,
        device="cpu",
        device_memory="60MB",
        kv=kv,
        kv_dir=tmp_path,
        chunk_size=chunk_size,
        attention="exact",
        reader=reader,
    ) as model:
        assert model.stats.reader == reader
        found = model(input_ids=prompt[None]).logits[0]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_other_dtype_than_stored(make_llama, reference, ids, stored, dtype):
    """Computing in another dtype than the checkpoint's equals transformers asked for that dtype."""
    directory = make_llama(DTYPES[stored])
    prompt = ids(70)
    expected = reference(directory, DTYPES[dtype]).run(prompt, 32)
    with ollm.load(directory, device="cpu", dtype=dtype, chunk_size=32, attention="exact") as model:
        assert torch.equal(model(input_ids=prompt[None]).logits[0], expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_greedy_decode_is_bitwise(make_llama, reference, ids, tmp_path, dtype):
    """64 greedy tokens and every logit behind them are those of transformers."""
    directory = make_llama(DTYPES[dtype])
    prompt = ids(300)
    tokens, logits = reference(directory, DTYPES[dtype]).greedy(prompt, 64, 128)
    with ollm.load(
        directory,
        device="cpu",
        chunk_size=128,
        attention="exact",
        kv="disk",
        kv_dir=tmp_path,
    ) as model:
        found_tokens, found_logits = greedy(model, prompt, 64)
    assert found_tokens == tokens
    assert torch.equal(found_logits, logits.float())


def test_streamed_equals_resident(make_llama, ids):
    """A model that reads every layer at every pass gives the bits of one that is wholly
    resident.
    """
    directory = make_llama(
        torch.bfloat16, hidden_size=256, intermediate_size=1024, num_hidden_layers=6
    )
    prompt = ids(200)
    with ollm.load(directory, device="cpu", attention="exact", chunk_size=64) as model:
        expected = model(input_ids=prompt[None]).logits
        assert model.stats.resident_bytes > 0.9 * model.stats.weight_bytes
        assert model.stats.weight_bytes_read == 0
    with ollm.load(
        directory, device="cpu", attention="exact", chunk_size=64, device_memory="8MB"
    ) as model:
        for _ in range(2):
            assert torch.equal(model(input_ids=prompt[None]).logits, expected)
        assert model.stats.resident_bytes < 0.5 * model.stats.weight_bytes
        assert model.stats.weight_bytes_read > model.stats.weight_bytes


@pytest.mark.parametrize("kv", ["device", "host", "disk"])
def test_blockwise_is_within_1e_5(make_llama, reference, ids, tmp_path, kv):
    """Block-wise attention in float32 differs from transformers by less than 1e-5 of the logits'
    scale.
    """
    directory = make_llama()
    prompt = ids(1100)
    expected = reference(directory, torch.float32).run(prompt, 200)
    with ollm.load(
        directory, device="cpu", kv=kv, kv_dir=tmp_path, chunk_size=200, attention="blockwise"
    ) as model:
        found = model(input_ids=prompt[None]).logits[0]
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    assert found.argmax(-1).equal(expected.argmax(-1))


def test_llama3_rope_and_shards(make_llama, reference, ids):
    """A sharded checkpoint with llama3 rope scaling is read right."""
    directory = make_llama(torch.bfloat16, shard="60KB", rope_scaling=LLAMA3_ROPE)
    assert len(list(directory.glob("*.safetensors"))) > 3
    prompt = ids(600)
    expected = reference(directory, torch.bfloat16).run(prompt, 256)
    with ollm.load(directory, device="cpu", chunk_size=256, attention="exact") as model:
        assert torch.equal(model(input_ids=prompt[None]).logits[0], expected)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_smollm2_is_bitwise(smollm2, reference, tmp_path, dtype):
    """SmolLM2 with its real weights: the logits of a prompt of three chunks and of greedy tokens
    are transformers'. Both are shorter in float16, in which CPUs are slow.
    """
    num_tokens, num_new, chunk_size = (80, 8, 32) if dtype == "float16" else (300, 12, 128)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(10, 49000, (num_tokens,), generator=generator)
    tokens, logits = reference(smollm2, DTYPES[dtype]).greedy(prompt, num_new, chunk_size)
    with ollm.load(
        smollm2,
        device="cpu",
        dtype=dtype,
        device_memory="400MB" if dtype == "float32" else "128MB",
        kv="disk",
        kv_dir=tmp_path,
        chunk_size=chunk_size,
        attention="exact",
    ) as model:
        found_tokens, found_logits = greedy(model, prompt, num_new)
        assert model.stats.weight_passes == num_new
    assert found_tokens == tokens
    assert torch.equal(found_logits, logits.float())
