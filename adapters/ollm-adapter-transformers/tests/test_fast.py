"""What a run computes by default, `precision="fast"`: attention block by block over handles where
the layers hand them on, products summed in float32; and what is refused that.
"""

import pytest
import torch
from trial import run_ours, run_reference, run_reference_greedy, saved, steps

import ollm
from ollm_core.testing import without_instructions

DIFFER = {
    "cohere2": "windows in some layers, parallel blocks, a scale on logits",
    "falcon_h1": "states beside keys in the same layers",
    "gemma2": "soft caps, and windows in every second layer",
    "gemma3_text": "windows, and two rotary embeddings",
    "glm4": "a rotary embedding of a part of each head",
    "gpt2": "learned positions, weights the other way round",
    "gpt_neox": "one product for queries, keys and values",
    "gpt_oss": "sinks and windows",
    "granite": "a scale of its own",
    "granitemoehybrid": "states in some layers, experts in all",
    "jamba": "state-space layers, attention and experts in turns",
    "lfm2": "convolutions in some layers",
    "mimo_v2_flash": "keys and values of different sizes, sinks",
    "mixtral": "experts",
    "olmo2": "norms of queries and keys",
    "opt": "positions of all tokens that came before",
    "phi3": "products that are fused",
    "qwen3": "norms of each head",
    "starcoder2": "windows in all layers, biases",
}
LAID_OUT = {
    "bloom": "attention of its own",
    "deepseek_v3": "the cache has latents, which are made keys and values of",
    "llama4_text": "masks of parts of the text",
}


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    """Without the adapters of families."""
    monkeypatch.setenv("OLLM_LOAD_PLUGINS", "ollm-adapter-transformers")


def error(found, true):
    """Of the token in the middle, as the suite's precision.fast has it."""
    return float((found.double() - true).square().mean(-1).sqrt().quantile(0.5))


@pytest.mark.parametrize("model_type", [*DIFFER, *LAID_OUT])
def test_same_tokens_in_float32(model_type):
    """Logits of a prompt and steps, of two rows, in chunks with KV on disk; greedy text."""
    with saved(model_type, torch.float32) as (model, directory):
        ids = torch.randint(3, 250, (2, 330), generator=torch.Generator().manual_seed(0))
        expected = run_reference(model, ids, steps(330))
        most = 2e-4 * float(expected.abs().max())
        with ollm.load(directory, device="cpu") as ours:
            found = run_ours(ours, ids, steps(330))
            how = ours.stats.attention
            told = ours.generate(
                ids[:1, :20], max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0
            )
        assert how == ("exact" if model_type in LAID_OUT else "blockwise")
        assert (found - expected).abs().max() <= most
        assert told[0, 20:].tolist() == run_reference_greedy(model, ids[:1, :20])
        options = {"chunk_size": 64, "kv": "disk", "kv_dir": directory / "kv"}
        with ollm.load(directory, device="cpu", **options) as ours:
            found = run_ours(ours, ids[:1], steps(330))
        assert (found - expected[:1]).abs().max() <= most


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("model_type", DIFFER)
def test_no_more_rounding_than_transformers(model_type, bare):
    """In bfloat16, whatever the processor's instructions are."""
    with saved(model_type, torch.bfloat16) as (model, directory):
        ids = torch.randint(3, 250, (1, 300), generator=torch.Generator().manual_seed(0))
        own = run_reference(model, ids, steps(300))
        true = run_reference(model.double(), ids, steps(300)).double()
        with without_instructions(bare), ollm.load(directory, device="cpu") as ours:
            found = run_ours(ours, ids, steps(300))
        assert error(found, true) <= 1.1 * error(own, true) + 2.0**-20 * float(true.abs().max())
