"""Logits that are no numbers are an error, never a token."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

import ollm
from ollm_core.engine.finite import require_finite
from ollm_core.errors import NotFiniteError


def damaged(directory, value=float("nan")):
    """The checkpoint with one weight of layer 1 replaced."""
    file = directory / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = value
    save_file(tensors, file, metadata={"format": "pt"})
    return directory


@pytest.mark.parametrize(
    "options",
    [{}, {"do_sample": True}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 3}],
    ids=lambda options: next(iter(options), "greedy"),
)
def test_a_damaged_weight_is_told(tiny, ids, options):
    """However a token is chosen; the cache is as before, and so is what comes after."""
    with ollm.load(damaged(tiny), device="cpu") as model:
        cache = model.new_cache("host")
        with pytest.raises(
            NotFiniteError, match=r"(\d+) of \1 are NaN .* float32\. hint: .*--dtype"
        ):
            model.generate(ids(9)[None], past_key_values=cache, max_new_tokens=4, **options)
        assert cache.get_seq_length() == 0
        with pytest.raises(NotFiniteError, match="1791 of 1791"):
            model(ids(9)[None])


def test_the_pass_that_has_it_is_undone(make_llama, ids):
    """A prompt goes through, and a token does not."""
    directory = make_llama(torch.float16)
    file = directory / "model.safetensors"
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"][7] = float("inf")
    save_file(tensors, file, metadata={"format": "pt"})
    prompt = ids(9).masked_fill(ids(9) == 7, 8)[None]
    with ollm.load(directory, device="cpu") as model:
        cache = model.new_cache("device")
        model(prompt, past_key_values=cache)
        held = cache.store.tier_bytes()
        with pytest.raises(NotFiniteError, match="float16"):
            model(torch.tensor([[7]]), past_key_values=cache)
        assert cache.store.num_tokens(cache.rows[0]) == cache.get_seq_length() == 9
        assert cache.store.tier_bytes() == held


def test_a_damaged_draft_model_is_told_as_such(make_llama):
    """It is read when it is opened, so that is where it shows."""
    draft = damaged(make_llama(name="draft"))
    with pytest.raises(NotFiniteError, match="the draft model: the model's logits are not finite"):
        ollm.load(make_llama(), device="cpu", draft="model", draft_model=draft)


def test_a_token_may_be_ruled_out():
    """By minus infinity; not all of them, and by nothing else."""
    logits = torch.zeros(2, 5)
    logits[:, 3] = -torch.inf
    require_finite([logits, logits[:1]])
    for value in (torch.inf, torch.nan):
        with pytest.raises(NotFiniteError):
            require_finite([logits, logits.index_fill(1, torch.tensor([2]), value)])
    with pytest.raises(NotFiniteError, match="0 of 10 are NaN and 6 infinite"):
        require_finite([torch.cat([logits[:1], logits[:1] - torch.inf])])
