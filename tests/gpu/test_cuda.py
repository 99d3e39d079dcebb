"""On a CUDA device: the same promises as on the CPU. Skipped where there is none."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

import ollm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
GREEDY = {"do_sample": False, "eos_token_id": None}


@pytest.mark.parametrize("kv", ["device", "host", "disk"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_greedy_tokens_are_those_of_transformers(make_llama, ids, tmp_path, dtype, kv):
    """64 greedy tokens, exact attention, weights streamed: bit for bit where one slice is read."""
    directory = make_llama(getattr(torch, dtype))
    prompt = ids(300)[None].cuda()
    theirs = AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, attn_implementation="eager"
    ).cuda()
    expected = theirs.generate(prompt, max_new_tokens=64, prefill_chunk_size=128, **GREEDY)
    with ollm.load(
        directory,
        device="cuda:0",
        device_memory="64MB",
        kv=kv,
        kv_dir=tmp_path,
        chunk_size=128,
        attention="exact",
    ) as model:
        found = model.generate(prompt, max_new_tokens=64, **GREEDY)
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_blockwise_is_as_good_as_transformers(make_llama, ids, dtype):
    """Block-wise attention is no further from float32 than un-offloaded transformers is."""
    directory = make_llama(getattr(torch, dtype))
    prompt = ids(1100)[None].cuda()
    with torch.no_grad():
        truth = AutoModelForCausalLM.from_pretrained(directory, dtype="float32").cuda()(prompt)
        theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).cuda()(prompt)
    with ollm.load(directory, device="cuda:0", attention="blockwise", chunk_size=256) as model:
        found = model(input_ids=prompt).logits
    error = (found.float() - truth.logits).abs().mean()
    assert error <= 1.5 * (theirs.logits.float() - truth.logits).abs().mean()


def test_device_memory_is_kept(make_llama, ids):
    """What the allocator saw at its peak is within the budget, the BLAS workspace apart."""
    directory = make_llama(
        torch.bfloat16, hidden_size=1024, intermediate_size=4096, num_hidden_layers=8
    )
    with ollm.load(directory, device="cuda:0", device_memory="80MB") as model:
        model.generate(ids(20)[None].cuda(), max_new_tokens=2, **GREEDY)
        workspace = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        model.generate(ids(600)[None].cuda(), max_new_tokens=8, **GREEDY)
        held = model.accounts.device.used
        peak = torch.cuda.max_memory_allocated() - max(workspace - held, 0)
    assert peak <= 80_000_000


def test_the_allocator_keeps_the_budget(make_llama, ids):
    """What no account knows of fails inside a pass when it goes past the budget; after the pass the
    process is free again.
    """
    directory = make_llama(torch.bfloat16, hidden_size=1024, intermediate_size=4096)
    with ollm.load(directory, device="cuda:0", device_memory="100MB") as model:
        prompt = ids(20)[None].cuda()
        model(input_ids=prompt)
        model.on_progress(lambda _: torch.empty(400 << 20, dtype=torch.uint8, device="cuda:0"))
        with pytest.raises(torch.OutOfMemoryError):
            model(input_ids=prompt)
        torch.empty(400 << 20, dtype=torch.uint8, device="cuda:0")
        model.on_progress(None)
        model(input_ids=prompt)


@pytest.mark.parametrize("kv", ["device", "host", "disk"])
@pytest.mark.parametrize("device_memory", ["40MB", "100MB"])
def test_a_plan_holds_what_the_allocator_saw(make_llama, ids, tmp_path, kv, device_memory):
    """The planned peak of the device is never below the measured one, the workspaces of matrix
    libraries apart, and at most 10% above it.
    """
    directory = make_llama(
        torch.bfloat16, hidden_size=1024, intermediate_size=4096, num_hidden_layers=8
    )
    options = {
        "device": "cuda:0", "device_memory": device_memory, "host_memory": "1GB", "kv": kv
    }  # fmt: skip
    planned = ollm.plan(directory, context=608, max_new_tokens=8, **options).device_peak_bytes
    square = torch.ones(64, 64, dtype=torch.bfloat16, device="cuda:0")
    square @ square  # makes the workspace
    del square
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with ollm.load(directory, kv_dir=tmp_path, keep_kv=False, **options) as model:
        model.generate(ids(600)[None].cuda(), max_new_tokens=8, **GREEDY)
        measured = torch.cuda.max_memory_allocated() - before
    assert measured <= planned <= 1.1 * measured
