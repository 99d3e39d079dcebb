"""`generate` is transformers' own: what works there works here, with the same tokens."""

from __future__ import annotations

import pytest
import torch
from transformers import StoppingCriteria, TextStreamer

from ollm_core import InputError, UnsupportedError

GREEDY = {"do_sample": False, "eos_token_id": None}


def alone(model, prompt, num_new=12):
    """Greedy tokens of one prompt."""
    found = model.generate(prompt[None], max_new_tokens=num_new, **GREEDY)
    return found[0, len(prompt) :].tolist()


def left_padded(prompts):
    """Prompts as one batch [B, S] with its mask."""
    longest = max(map(len, prompts))
    batch = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(batch)
    for row, prompt in enumerate(prompts):
        batch[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    return batch, mask


def test_left_padded_batch_equals_each_alone(model, ids):
    """A batch of unequal prompts gives the greedy tokens of each prompt alone."""
    prompts = [ids(5, seed=1), ids(150, seed=2), ids(64, seed=3), ids(5, seed=4)]
    batch, mask = left_padded(prompts)
    found = model.generate(batch, attention_mask=mask, max_new_tokens=12, **GREEDY)
    expected = [alone(model, prompt) for prompt in prompts]
    assert found[:, batch.shape[1] :].tolist() == expected


def test_left_padded_batch_equals_transformers(model, tiny, reference, ids):
    """The same padded batch through un-offloaded transformers gives the same tokens."""
    prompts = [ids(9, seed=1), ids(31, seed=2)]
    batch, mask = left_padded(prompts)
    theirs = reference(tiny, torch.float32).model.generate(
        batch, attention_mask=mask, max_new_tokens=12, **GREEDY
    )
    found = model.generate(batch, attention_mask=mask, max_new_tokens=12, **GREEDY)
    assert found.tolist() == theirs.tolist()


def test_padded_logits_of_all_positions(model, ids):
    """Logits at real positions equal those of the prompt alone; at padding they are zero."""
    prompts = [ids(9, seed=1), ids(31, seed=2)]
    batch, mask = left_padded(prompts)
    logits = model(input_ids=batch, attention_mask=mask).logits
    single = model(input_ids=prompts[0][None]).logits[0]
    assert torch.allclose(logits[0, 22:], single, atol=1e-4)
    assert not logits[0, :22].any()


@pytest.mark.parametrize("dtype", [torch.float32])
def test_sampling_equals_transformers(model, tiny, reference, ids, dtype):
    """With the same seed, sampling draws the tokens that transformers draws."""
    prompt = ids(20)[None]
    options = {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9}
    options |= {"max_new_tokens": 16, "eos_token_id": None}
    torch.manual_seed(7)
    expected = reference(tiny, dtype).model.generate(prompt, **options)
    torch.manual_seed(7)
    assert model.generate(prompt, **options).tolist() == expected.tolist()


def test_beam_search_equals_transformers(model, tiny, reference, ids):
    """Beam search reorders the cache: sequences are forked, and the tokens are the same."""
    prompt = ids(70)[None]
    options = {"num_beams": 3, "max_new_tokens": 10, **GREEDY}
    expected = reference(tiny, torch.float32).model.generate(prompt, **options)
    assert model.generate(prompt, **options).tolist() == expected.tolist()


def test_prompt_lookup_decoding_keeps_the_tokens(model, ids):
    """Drafts that transformers takes from the prompt are verified in one pass, losslessly."""
    prompt = ids(12).repeat(6)
    passes = model.stats.weight_passes
    expected = alone(model, prompt, 24)
    plain = model.stats.weight_passes - passes
    found = model.generate(prompt[None], max_new_tokens=24, prompt_lookup_num_tokens=4, **GREEDY)
    assert found[0, len(prompt) :].tolist() == expected
    assert model.stats.weight_passes - passes - plain <= plain


def test_eos_ends_generation(model, ids):
    """Generation stops at the end-of-sequence token, and pads the other rows."""
    prompt = ids(20)
    tokens = alone(model, prompt)
    eos = tokens[4]
    found = model.generate(
        prompt[None], max_new_tokens=12, do_sample=False, eos_token_id=eos, pad_token_id=0
    )
    assert found[0, 20:].tolist() == tokens[: tokens.index(eos) + 1]


def test_stopping_criteria(model, ids):
    """A stopping criterion of the caller is asked after each token."""

    class After(StoppingCriteria):
        def __call__(self, input_ids, scores, **_):
            return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 23)

    found = model.generate(ids(20)[None], max_new_tokens=12, stopping_criteria=[After()], **GREEDY)
    assert found.shape[1] == 23


def test_streamer_gets_tokens_as_they_come(model, ids):
    """A streamer sees the prompt, then each token."""

    class Seen(TextStreamer):
        def __init__(self):
            self.tokens = []

        def put(self, value):
            self.tokens.append(value.flatten().tolist())

        def end(self):
            self.tokens.append("end")

    seen = Seen()
    prompt = ids(20)
    found = model.generate(prompt[None], max_new_tokens=3, streamer=seen, **GREEDY)
    assert seen.tokens == [prompt.tolist(), *[[t] for t in found[0, 20:].tolist()], "end"]


def test_wrong_input_is_refused(model):
    """An empty prompt, a foreign token and too long a prompt give one line each."""
    with pytest.raises(InputError, match="empty"):
        model(input_ids=torch.zeros(1, 0, dtype=torch.long))
    with pytest.raises(InputError, match="token id 199"):
        model(input_ids=torch.tensor([[5, 199]]))
    with pytest.raises(InputError, match="4097 tokens are past the model's 4096"):
        model(input_ids=torch.ones(1, 4097, dtype=torch.long))
    with pytest.raises(UnsupportedError, match="attentions"):
        model(input_ids=torch.tensor([[5]]), output_attentions=True)


def test_memory_goes_back_after_generate(model, ids):
    """When the tokens are out, no KV and no activations are held."""
    model.generate(ids(300)[None], max_new_tokens=3, **GREEDY)
    held = {kind: n for kind, n in model.accounts.device.kinds.items() if "weights" not in kind}
    assert not any(held.values())


def test_a_batch_padded_on_the_right_is_refused(model, ids):
    """Before anything runs: a row that ends in padding has no logits to choose a token from."""
    batch, mask = left_padded([ids(9, seed=1), ids(31, seed=2)])
    right = {"attention_mask": mask.flip(1), "max_new_tokens": 3}
    for options in ({}, {"num_beams": 2}, {"use_cache": False}, {"logits_to_keep": 0}):
        with pytest.raises(InputError, match=r"row 0 .* ends in padding.*padding_side = 'left'"):
            model.generate(batch.flip(1), **right, **options, **GREEDY)
    assert model.stats.weight_passes == 0
    logits = model(batch.flip(1), mask.flip(1)).logits  # what is scored may end in it
    single = model(ids(9, seed=1).flip(0)[None]).logits[0]
    assert torch.allclose(logits[0, :9], single, atol=1e-4)
    assert not logits[0, 9:].any()


def test_options_of_other_models_are_refused(model, ids):
    """What transformers' own layers and caches would do with it, and what there is instead."""
    for option in (
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 8},
        {"prompt_lookup_num_tokens": 2, "assistant_early_exit": 1},
    ):
        with pytest.raises(UnsupportedError, match=f"takes no {list(option)[-1]}.*loading"):
            model.generate(ids(20)[None], max_new_tokens=3, **option)
    for name, option in (
        ("generate_batch", {"cache_implementation": "paged", "num_beams": 1}),
        ("load_custom_generate", {"custom_generate": "a/b", "trust_remote_code": True}),
        ("load_custom_generate", {"penalty_alpha": 0.6, "top_k": 4, "trust_remote_code": True}),
    ):
        with pytest.raises(UnsupportedError, match=f"has no {name}"):
            model.generate(ids(20)[None], max_new_tokens=3, **option)


def test_a_generation_loop_of_the_caller(model, ids):
    """A function in place of transformers' loop is called with the model."""

    def loop(model, input_ids, logits_processor, stopping_criteria, generation_config, **options):
        return model._sample(
            input_ids, logits_processor, stopping_criteria, generation_config, **options
        )

    prompt = ids(20)
    found = model.generate(prompt[None], max_new_tokens=4, custom_generate=loop, **GREEDY)
    assert found[0, 20:].tolist() == alone(model, prompt, 4)


def test_a_tokenizer_is_for_generate_itself(model, ids):
    """As for stop strings: transformers hands it on to `forward`, where it says nothing."""
    prompt = ids(20)
    for more in ({}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 3}):
        options = {"max_new_tokens": 4, **GREEDY, **more}
        expected = model.generate(prompt[None], **options)
        found = model.generate(prompt[None], tokenizer=object(), **options)
        assert torch.equal(found, expected)
