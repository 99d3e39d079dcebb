"""On a CUDA device: tiny models of other families, with all that has a part on the device."""

from __future__ import annotations

import pytest
import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from ollm_conformance.compare import same_tokens
from ollm_conformance.models import DTYPES
from ollm_conformance.subject import CHUNK, Reference, Subject, greedy
from ollm_core.plugins.registry import Registry
from ollm_core.weights.formats.mxfp4 import dequantize_mxfp4

pytestmark = pytest.mark.gpu
FAMILIES = ["gpt-oss", "qwen3-next"]


@pytest.fixture
def subject(tmp_path):
    """An installed adapter with its tiny model, by name."""
    return lambda name: Subject(Registry.discover().adapters[name], tmp_path / name)


@pytest.mark.parametrize("kv", ["device", "disk"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_transformers(device, streamed, subject, family, dtype, kv):
    """All weights streamed, experts and states included."""
    tiny = subject(family)
    directory, prompt = tiny.tiny(dtype), tiny.prompt(200)
    expected, _ = Reference(directory, DTYPES[dtype], device, CHUNK).greedy(prompt, 16)
    with tiny.open(directory, device=device, kv=kv, **streamed) as model:
        found, _ = greedy(model, prompt, 16)
        assert model.stats.weight_bytes_read > 0
    same_tokens(found, expected, f"{family} in {dtype}")


@pytest.mark.parametrize("family", ["llama", *FAMILIES])
def test_drafts_change_no_token(device, subject, family):
    """A text that repeats itself is drafted for, right or wrong, with the states to go back to."""
    tiny = subject(family)
    prompt = tiny.prompt(12).repeat(8)
    with tiny.open(device=device) as model:
        expected, _ = greedy(model, prompt, 24)
    with tiny.open(device=device, draft="lookup", num_draft_tokens=4) as model:
        ids = prompt[None].to(device)
        found = model.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=None)
        assert model.stats.drafted_tokens > 0
    same_tokens(found[0, len(prompt) :].tolist(), expected, family)


@pytest.mark.parametrize("family", ["llama", *FAMILIES])
def test_a_batch_gives_the_tokens_of_each_alone(device, subject, family):
    """Two prompts of different lengths, the shorter one padded on its left."""
    tiny = subject(family)
    prompts = [tiny.prompt(90), tiny.prompt(40, seed=1)]
    ids = torch.zeros(2, 90, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, -len(prompt) :], mask[row, -len(prompt) :] = prompt, 1
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with tiny.open(device=device) as model:
        alone = [greedy(model, prompt, 8)[0] for prompt in prompts]
        found = model.generate(ids.to(device), attention_mask=mask.to(device), **options)
    for row, expected in enumerate(alone):
        same_tokens(found[row, 90:].tolist(), expected, f"{family}, row {row}")


@pytest.mark.parametrize("family", ["llama", *FAMILIES])
def test_a_prompt_is_found_again_on_disk(device, subject, family, tmp_path):
    """The next run continues from what the first one kept, with the same tokens."""
    tiny = subject(family)
    prompt = tiny.prompt(600)
    options = {"device": device, "kv": "disk", "kv_dir": tmp_path / "kv", "keep_kv": True}
    with tiny.open(**options) as model:
        expected, _ = greedy(model, prompt, 8)
        assert model.stats.cached_tokens == 0
    with tiny.open(**options) as model:
        found, _ = greedy(model, prompt, 8)
        assert model.stats.cached_tokens >= 256
    same_tokens(found, expected, family)


def test_mxfp4_has_the_bits_of_transformers(device):
    """All 256 bytes under all scales, decoded on the device and, by transformers, on the CPU."""
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(256, 16, 16).contiguous()
    scales = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 16).contiguous()
    expected = convert_moe_packed_tensors(blocks[None], scales[None])[0]
    found = dequantize_mxfp4(blocks.to(device), scales.to(device))
    assert found.device == torch.device(device)
    assert torch.equal(found.cpu().view(torch.int16), expected.view(torch.int16))


@pytest.mark.parametrize("family", ["llama", *FAMILIES])
def test_weights_are_converted_on_the_device(device, streamed, subject, family):
    """A float32 checkpoint opened in bfloat16, all weights streamed, is what transformers makes of
    it.
    """
    tiny = subject(family)
    directory, prompt = tiny.tiny("float32"), tiny.prompt(100)
    expected, _ = Reference(directory, torch.bfloat16, device, CHUNK).greedy(prompt, 12)
    with tiny.open(directory, device=device, dtype="bfloat16", **streamed) as model:
        found, _ = greedy(model, prompt, 12)
        assert model.stats.weight_bytes_read > 0
    same_tokens(found, expected, family)
