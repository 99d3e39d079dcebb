"""Caches of sequences between calls of `generate`: gone on with, cut, copied, refused."""

from __future__ import annotations

import pytest
import torch

import ollm
from ollm_core import DoesNotFitError, InputError, KVStoreError

GREEDY = {"do_sample": False, "eos_token_id": None}


def alone(model, prompt, num_new=12):
    """Greedy tokens of one prompt."""
    found = model.generate(prompt[None], max_new_tokens=num_new, **GREEDY)
    return found[0, len(prompt) :].tolist()


@pytest.mark.parametrize("kv", ["device", "host", "disk"])
def test_second_turn_on_the_same_cache(model, ids, tmp_path, kv):
    """A second question on the same cache equals one prompt of everything said so far."""
    cache = model.new_cache(kv, tmp_path)
    first = model.generate(ids(300)[None], past_key_values=cache, max_new_tokens=5, **GREEDY)
    assert cache.get_seq_length() == 304  # the last token has not been through the model
    both = torch.cat([first[0], ids(40, seed=9)])
    tokens = model.stats.prefill_tokens
    found = model.generate(both[None], past_key_values=cache, max_new_tokens=8, **GREEDY)
    assert model.stats.prefill_tokens - tokens == 41
    assert found[0, len(both) :].tolist() == alone(model, both, 8)


def test_crop_and_replay(model, ids):
    """Dropping the last positions and giving them again changes nothing."""
    cache = model.new_cache("device")
    prompt = ids(100)[None]
    expected = model(input_ids=prompt, past_key_values=cache).logits[0, 60:]
    cache.crop(-40)
    assert cache.get_seq_length() == 60
    found = model(input_ids=prompt[:, 60:], past_key_values=cache).logits[0]
    assert torch.allclose(found, expected, atol=1e-4)
    cache.crop(30)
    assert cache.get_seq_length() == 30


def test_a_crop_past_the_start_empties(model, ids):
    """As in transformers: of more positions than there are none is left, whatever the number."""
    for number in (20, 25, 39, 40, 1000):
        cache = model.new_cache("device")
        model(input_ids=ids(20)[None], past_key_values=cache)
        cache.crop(-number)
        assert (cache.get_seq_length(), cache.num_tokens(0)) == (0, 0)


def test_a_refused_crop_leaves_the_notes(model, ids):
    """A store that cannot go back leaves a cache that says what it has."""
    cache = model.new_cache("device")
    model(input_ids=torch.stack([ids(20), ids(20, seed=1)]), past_key_values=cache)

    def refuse(sequence, num_tokens):
        raise KVStoreError("not so far back")

    cache.store.truncate = refuse
    with pytest.raises(KVStoreError, match="not so far back"):
        cache.crop(-5)
    assert [len(kept) for kept in cache.kept] == [20, 20]


def test_refused_copies_of_rows_leak_nothing(model, ids):
    """There is memory for one copy and not for three: the rows and the account stay as they are."""
    cache, account = model.new_cache("device"), model.accounts.device
    model(input_ids=ids(20)[None], past_key_values=cache)
    used, rows = account.used, [*cache.rows]
    copy = cache.store.fork(rows[0])
    account.limit = account.used
    cache.store.release(copy)
    with pytest.raises(DoesNotFitError):
        cache.batch_repeat_interleave(3)
    assert (account.used, cache.rows) == (used, rows)


def test_no_cache(model, ids):
    """Without a cache every step is a prefill of everything, and the tokens are the same."""
    prompt = ids(20)
    found = model.generate(prompt[None], max_new_tokens=4, use_cache=False, **GREEDY)
    assert found[0, 20:].tolist() == alone(model, prompt, 4)


def test_cache_of_transformers_is_refused(model, ids):
    """A cache that the model did not make is refused in one line."""
    from transformers import DynamicCache

    with pytest.raises(InputError, match="DynamicCache"):
        model.generate(ids(5)[None], past_key_values=DynamicCache(), max_new_tokens=2)


def test_a_config_without_cache_still_uses_one(make_llama, reference, ids):
    """A checkpoint whose config says `use_cache: false` is not prefilled again at every token."""
    directory = make_llama(use_cache=False)
    prompt = ids(40)
    expected, _ = reference(directory, torch.float32).greedy(prompt, 4, 40)
    with ollm.load(directory, device="cpu", chunk_size=40) as model:
        found = model.generate(prompt[None], max_new_tokens=4, do_sample=False, eos_token_id=None)
        assert found[0, 40:].tolist() == expected
        assert model.stats.prefill_tokens == 40
