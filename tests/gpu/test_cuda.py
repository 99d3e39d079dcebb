"""On a CUDA device: the same promises as on the CPU. Skipped where there is none."""

from __future__ import annotations

import shutil
from contextlib import closing

import pytest
import torch
from transformers import AutoModelForCausalLM

import ollm
from ollm_conformance.card import CardPeak
from ollm_core import DoesNotFitError

pytestmark = pytest.mark.gpu
GREEDY = {"do_sample": False, "eos_token_id": None}


def run(model, ids):
    """A prompt of 600 tokens and 8 more, without what `generate` itself has on the device."""
    with closing(model.new_cache(num_tokens=608)) as cache:
        model(input_ids=ids(600)[None], past_key_values=cache, logits_to_keep=1)
        for _ in range(8):
            model(input_ids=ids(1)[None], past_key_values=cache, logits_to_keep=1)


@pytest.mark.parametrize("kv", ["device", "host", "disk"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_greedy_tokens_are_those_of_transformers(
    device, streamed, make_llama, ids, tmp_path, dtype, kv
):
    """64 greedy tokens, exact attention, weights streamed: bit for bit where one slice is read."""
    directory = make_llama(getattr(torch, dtype))
    prompt = ids(300)[None].to(device)
    theirs = AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, attn_implementation="eager"
    ).to(device)
    expected = theirs.generate(prompt, max_new_tokens=64, prefill_chunk_size=128, **GREEDY)
    with ollm.load(
        directory,
        device=device,
        device_memory="64MB",
        kv=kv,
        kv_dir=tmp_path,
        chunk_size=128,
        attention="exact",
        **streamed,
    ) as model:
        found = model.generate(prompt, max_new_tokens=64, **GREEDY)
    assert found.tolist() == expected.tolist()


def test_rotary_frequencies_are_those_of_transformers(device, make_llama):
    """It computes them on the CPU, whatever the device, and a GPU's have other last bits."""
    directory = make_llama(torch.bfloat16)
    theirs = AutoModelForCausalLM.from_pretrained(directory).to(device).model.rotary_emb
    with ollm.load(directory, device=device) as model:
        assert torch.equal(model.engine._skeleton.rotary.inv_freq, theirs.inv_freq)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_where_tensors_begin_in_their_file_is_of_no_account(
    device, streamed, make_llama, ids, tmp_path, dtype
):
    """Data at 8 modulo 16, as headers of safetensors often leave it: the same logits."""
    directory = make_llama(getattr(torch, dtype))
    moved = tmp_path / "moved"
    shutil.copytree(directory, moved)
    file = moved / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    padding = b" " * ((-length) % 16)  # the header ends at 8 modulo 16
    header = content[8 : 8 + length] + padding
    file.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    found = []
    for place in (directory, moved):
        with ollm.load(place, device=device, attention="exact", **streamed) as model:
            found.append(model(input_ids=ids(100)[None].to(device)).logits)
    assert torch.equal(*found)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_blockwise_is_as_good_as_transformers(device, make_llama, ids, dtype):
    """Block-wise attention is no further from float32 than un-offloaded transformers is."""
    directory = make_llama(getattr(torch, dtype))
    prompt = ids(1100)[None].to(device)
    with torch.no_grad():
        open_model = AutoModelForCausalLM.from_pretrained
        truth = open_model(directory, dtype="float32").to(device)(prompt)
        theirs = open_model(directory, dtype=dtype).to(device)(prompt)
    with ollm.load(directory, device=device, attention="blockwise", chunk_size=256) as model:
        found = model(input_ids=prompt).logits
    error = (found.float() - truth.logits).abs().mean()
    assert error <= 1.5 * (theirs.logits.float() - truth.logits).abs().mean()


def test_device_memory_is_kept(card, make_llama, ids):
    """What was asked of the allocator at its peak is within the budget."""
    directory = make_llama(
        torch.bfloat16, hidden_size=1024, intermediate_size=4096, num_hidden_layers=8
    )
    with CardPeak(card) as peak, ollm.load(directory, device=card, device_memory="80MB") as model:
        run(model, ids)
    assert 0 < peak.requested_bytes <= 80_000_000


def test_the_allocator_keeps_the_budget(card, make_llama, ids):
    """What no account knows of fails inside a pass when it goes past the budget; after the pass the
    process is free again.
    """
    directory = make_llama(torch.bfloat16, hidden_size=1024, intermediate_size=4096)
    with ollm.load(directory, device=card, device_memory="100MB") as model:
        prompt = ids(20)[None].to(card)
        model(input_ids=prompt)
        model.on_progress(lambda _: torch.empty(400 << 20, dtype=torch.uint8, device=card))
        with pytest.raises(DoesNotFitError) as caught:  # tried twice, the second time with less
            model(input_ids=prompt)
        assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
        torch.empty(400 << 20, dtype=torch.uint8, device=card)
        model.on_progress(None)
        model(input_ids=prompt)


@pytest.mark.parametrize("kv", ["device", "host", "disk"])
@pytest.mark.parametrize("device_memory", ["40MB", "100MB"])
def test_a_plan_holds_what_the_allocator_saw(card, make_llama, ids, tmp_path, kv, device_memory):
    """The planned peak of the device is never below the measured one, the workspaces of matrix
    libraries apart, and at most 10% above it.
    """
    directory = make_llama(
        torch.bfloat16, hidden_size=1024, intermediate_size=4096, num_hidden_layers=8
    )
    options = {"device": card, "device_memory": device_memory, "host_memory": "1GB", "kv": kv}
    planned = ollm.plan(directory, context=608, max_new_tokens=8, **options).device_peak_bytes
    with (
        CardPeak(card) as peak,
        ollm.load(directory, kv_dir=tmp_path, keep_kv=False, **options) as model,
    ):
        run(model, ids)
    assert peak.requested_bytes <= planned <= 1.1 * peak.requested_bytes
