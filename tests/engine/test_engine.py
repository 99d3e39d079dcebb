"""The weight pass: one reading of the weights, whatever comes in; nothing torn when it fails."""

from __future__ import annotations

import threading

import pytest
import torch

import ollm
from ollm_adapter_gpt_oss import GptOssAdapter
from ollm_adapter_llama import LlamaAdapter
from ollm_adapter_qwen3_next import Qwen3NextAdapter
from ollm_conformance.subject import Subject
from ollm_core import DoesNotFitError, InputError, ReadError
from ollm_core.engine.batch import NewTokens
from ollm_core.memory.pair import PerMemory

WIDE = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6}
GREEDY = {"do_sample": False, "eos_token_id": None}


def test_one_reading_per_pass(make_llama, ids):
    """A prompt of many chunks, and a batch, read what is not resident once, and not a byte more."""
    directory = make_llama(torch.bfloat16, **WIDE)
    pages = 2 * 4096 * (WIDE["num_hidden_layers"] + 2)
    with ollm.load(directory, device="cpu", device_memory="9MB", chunk_size=64) as model:
        for prompt in (ids(30)[None], ids(500)[None], ids(60).reshape(3, 20), ids(1)[None]):
            before = model.stats
            model(input_ids=prompt, logits_to_keep=1)
            after = model.stats
            ahead = 6 * model.weights.slot_bytes  # once more where the resident set changed
            streamed = after.weight_bytes - after.resident_bytes
            assert after.weight_passes - before.weight_passes == 1
            assert after.weight_bytes_read - before.weight_bytes_read > 0
            assert after.weight_bytes_read - before.weight_bytes_read <= streamed + ahead + pages


@pytest.mark.parametrize("kv", ["device", "host", "disk"])
def test_a_failed_read_leaves_a_usable_model(make_llama, ids, tmp_path, monkeypatch, kv):
    """A read that fails in the middle of a pass is reported; the cache and the model go on."""
    directory = make_llama(torch.bfloat16, **WIDE)
    prompt = ids(400)
    with ollm.load(
        directory, device="cpu", device_memory="9MB", kv=kv, kv_dir=tmp_path / "kv"
    ) as model:
        cache = model.new_cache()
        model(input_ids=prompt[None, :300], past_key_values=cache)
        source = model.weights._source
        real, countdown = source.read, [4]

        def failing(tensors, buffer):
            countdown[0] -= 1
            if countdown[0] == 0:
                raise ReadError("the disk is gone")
            return real(tensors, buffer)

        monkeypatch.setattr(source, "read", failing)

        def go_on():
            for _ in range(3):
                model(input_ids=prompt[None, 300:], past_key_values=cache)
                cache.crop(-100)

        with pytest.raises(ReadError, match="gone"):
            go_on()
        assert cache.get_seq_length() == 300
        found = model(input_ids=prompt[None, 300:], past_key_values=cache).logits
        fresh = model.new_cache()
        model(input_ids=prompt[None, :300], past_key_values=fresh)
        expected = model(input_ids=prompt[None, 300:], past_key_values=fresh).logits
    assert torch.equal(found, expected)


def test_interrupted_pass_is_undone(tiny, ids):
    """Ctrl-C between two layers leaves the cache as it was."""
    with ollm.load(tiny, device="cpu", chunk_size=16) as model:
        cache = model.new_cache("host")
        model(input_ids=ids(50)[None], past_key_values=cache)

        def interrupt(progress):
            if progress.steps_done == 3:
                raise KeyboardInterrupt

        model.on_progress(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(input_ids=ids(50)[None], past_key_values=cache)
        model.on_progress(None)
        assert cache.get_seq_length() == 50
        assert cache.store.num_tokens(cache.rows[0], 0) == 50


class FailingStep:
    """Raises `error` at the `at`-th call of a method, then lets it be as it was."""

    def __init__(self, patch, owner, name, at, error):
        self.real, self.left, self.error = getattr(owner, name), at, error
        patch.setattr(owner, name, self)

    def __call__(self, *arguments, **options):
        self.left -= 1
        if self.left == 0:
            raise self.error
        return self.real(*arguments, **options)


FAILURES = {
    "no room for the second row": ("reserve", 2, DoesNotFitError("the disk is full")),
    "Ctrl-C between two reservations": ("reserve", 2, KeyboardInterrupt()),
    "a write that fails in a layer": ("append", 3, ReadError("the disk is gone")),
    "Ctrl-C when one row is committed": ("commit", 2, KeyboardInterrupt()),
}


@pytest.mark.parametrize(
    ("adapter", "kv"),
    [
        (LlamaAdapter, "device"),
        (LlamaAdapter, "host"),
        (LlamaAdapter, "disk"),
        (GptOssAdapter, "device"),
        (Qwen3NextAdapter, "disk"),
    ],
)
def test_a_batch_that_fails_leaves_each_row_as_it_was(tmp_path, monkeypatch, adapter, kv):
    """Tokens, room and what comes next of both rows are those from before, wherever it stops."""
    subject = Subject(adapter(), tmp_path / "model")
    first, second = subject.prompt(100), subject.prompt(200)[100:]
    with subject.open(subject.tiny(), kv=kv, kv_dir=tmp_path / "kv") as model:
        cache = model.new_cache()
        store, run = cache.store, model.engine.run
        rows = [store.new_sequence(), store.new_sequence()]
        run(store, [NewTokens(rows[0], first[:20], 0)])
        store.truncate(rows[0], 20)  # without the room that stood ready for the next token
        before = store.tier_bytes()
        work = [NewTokens(rows[0], first[20:], 20), NewTokens(rows[1], second, 0)]
        for name, at, error in FAILURES.values():
            with monkeypatch.context() as patch:
                FailingStep(patch, store, name, at, error)
                with pytest.raises(type(error)):
                    run(store, work)
            assert [store.num_tokens(row) for row in rows] == [20, 0]
            assert store.tier_bytes() == before
        found = run(store, work)
        store.truncate(rows[1], 0)
        fresh = store.new_sequence()
        run(store, [NewTokens(fresh, first[:20], 0)])
        expected = run(store, [NewTokens(fresh, first[20:], 20), NewTokens(rows[1], second, 0)])
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_what_is_set_aside_is_so_in_both_memories_or_in_none(tiny, monkeypatch):
    """A host that has less than it seemed to have leaves the device as it was."""
    with ollm.load(tiny, device="cpu") as model:
        device, host = model.accounts.device, model.accounts.host
        used = device.used
        FailingStep(monkeypatch, host, "reserve", 1, DoesNotFitError("taken by others"))
        with pytest.raises(DoesNotFitError, match="taken by others"):
            model.engine.set_aside("draft model", PerMemory(1000, 1000))
        assert device.used == used


@pytest.mark.parametrize("layers", [(0,), (0, 1, 2)], ids=["torn", "whole"])
def test_rows_that_were_left_longer_are_cut(tiny, ids, layers):
    """A cache whose store has tokens that were never noted, in some layers or in all, goes on as if
    it had not.
    """
    prompt = ids(60)[None]
    with ollm.load(tiny, device="cpu") as model:
        caches = [model.new_cache("host") for _ in range(2)]
        for cache in caches:
            model(input_ids=prompt[:, :50], past_key_values=cache)
        for layer_idx in layers:
            caches[0].store.append(layer_idx, caches[0].rows[0], *torch.randn(2, 2, 7, 16))
        found, expected = (
            model(input_ids=prompt[:, 50:], past_key_values=cache).logits for cache in caches
        )
    assert torch.equal(found, expected)


def test_two_models_on_two_threads(make_llama, reference, ids):
    """Two models interleaved on two threads, and plain transformers beside them, do not meet."""
    directories = [make_llama(name=f"m{i}", seed=i, **WIDE) for i in range(2)]
    prompt = ids(150)
    references = [reference(directory, torch.float32) for directory in directories]
    expected = [r.greedy(prompt, 12, 64)[0] for r in references]
    found: dict[int, list] = {0: [], 1: []}

    def work(i):
        with ollm.load(
            directories[i], device="cpu", device_memory="30MB", chunk_size=64, attention="exact"
        ) as model:
            for _ in range(3):
                tokens = model.generate(prompt[None], max_new_tokens=12, **GREEDY)
                found[i].append(tokens[0, 150:].tolist())

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    beside = [references[0].greedy(prompt, 12, 64)[0] for _ in range(2)]
    for thread in threads:
        thread.join()
    assert found == {0: [expected[0]] * 3, 1: [expected[1]] * 3}
    assert beside == [expected[0]] * 2


def test_close_frees_everything(tiny, ids):
    """After close the reader is gone, and closing again does nothing."""
    model = ollm.load(tiny, device="cpu", device_memory="2MB")
    model.generate(ids(20)[None], max_new_tokens=3, **GREEDY)
    model.close()
    model.close()
    with pytest.raises(InputError, match="closed"):
        model(input_ids=ids(5)[None])
    assert not [t for t in threading.enumerate() if t.name.startswith("ollm")]


@pytest.mark.parametrize("kv", ["host", "disk"])
def test_weights_take_turns_with_kv_on_the_same_disk(tiny, ids, tmp_path, kv):
    """A block of KV waits for a part of a layer's weights then, not for all of them."""
    with ollm.load(tiny, device="cpu", kv_dir=tmp_path) as model:
        told, real = [], model.weights._source.take_turns
        model.weights._source.take_turns = lambda now: (told.append(now), real(now))
        for tier in (kv, "host"):
            cache = model.new_cache(tier)
            model(input_ids=ids(300)[None], past_key_values=cache, logits_to_keep=1)
            cache.close()
    assert told == [kv == "disk", False]
