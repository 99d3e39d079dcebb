"""KV that outlives its store: what is found again is right to the bit, or it is not found."""

from __future__ import annotations

import json
import os
import random
import signal
import stat
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kept_prefixes import GEOMETRY, add, content, expected_kv, kept, numbers, open_store

import ollm
from ollm_core import CacheKind, DamagedKVError, KeepsPrefixes
from ollm_core.engine.batch import NewTokens

GREEDY = {"do_sample": False, "eos_token_id": None}


def found_right(store, prompt):
    """The number of tokens found; they must have the right bits, or be refused as damaged."""
    sequence, num_tokens = store.find(prompt)
    assert store.num_tokens(sequence) == num_tokens
    if num_tokens:
        for layer_idx in range(2):
            with suppress(DamagedKVError):
                expected = expected_kv(prompt[:num_tokens], layer_idx)
                assert torch.equal(content(store, layer_idx, sequence), expected)
    return num_tokens


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 21])
def test_all_tokens_are_found_again(tmp_path, length):
    """Closed and opened, a store has every token of a sequence, unfinished blocks too."""
    prompt = numbers(length)
    kept(tmp_path, prompt)
    with open_store(tmp_path) as store:
        assert isinstance(store, KeepsPrefixes)
        assert found_right(store, prompt) == length
        assert found_right(store, torch.cat([prompt, prompt[:1] + 60])) == length


def test_a_prompt_that_begins_alike(tmp_path):
    """The longest common beginning is found, at any token; too short a one is left alone."""
    prompt = numbers(21)
    kept(tmp_path, prompt, numbers(9, 5))
    with open_store(tmp_path) as store:
        for common in (20, 18, 6):
            other = torch.cat([prompt[:common], prompt[common : common + 1] + 1, numbers(5, 9)])
            assert found_right(store, other) == common
        assert found_right(store, torch.cat([prompt[:3], numbers(20, 9) + 60])) == 0
        assert found_right(store, numbers(9, 5)) == 9
        assert found_right(store, numbers(9, 6)) == 0


def test_going_on_inside_a_kept_prefix(tmp_path):
    """Two prompts that go on differently after the same beginning are both kept, and the first is
    not disturbed.
    """
    first = numbers(21)
    second = torch.cat([first[:18], numbers(12, 3) + 60])
    longer = torch.cat([first, numbers(6, 4)])
    kept(tmp_path, first)
    kept(tmp_path, second)
    kept(tmp_path, longer)
    with open_store(tmp_path) as store:
        assert len(store._pins) == 2  # the longer one stands for the first
        used = [f"prefixes.{pin.prefix.key.hex()}.used" for pin in store._pins]
        for prompt in (first, second, longer):
            assert found_right(store, prompt) == len(prompt)
    (home,) = tmp_path.iterdir()
    assert sorted(path.name for path in home.iterdir()) == [
        "layer-00000.kv", "layer-00001.kv", *sorted(used), "prefixes.journal",
    ]  # fmt: skip
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in home.iterdir()} == {0o600}


def test_tokens_that_were_not_named_are_not_kept(tmp_path):
    """After a cut, or without `keep`, only what is sure is kept."""
    prompt = numbers(21)
    with open_store(tmp_path) as store:
        sequence = store.new_sequence()
        add(store, sequence, prompt)
        store.truncate(sequence, 10)
        for layer_idx in range(2):
            extra = torch.zeros(3, 5, 5)
            store.append(layer_idx, sequence, extra, extra)
    with open_store(tmp_path) as store:
        assert found_right(store, prompt) == 20  # its full blocks were kept before the cut
        tokens = sorted(len(one.prefix.token_ids) for one in store._pins)
        assert tokens == [20]


@pytest.mark.parametrize(
    ("change", "fingerprint"),
    [
        ({}, "beef"),
        ({"block_size": 8}, "f00d"),
        ({"dtype": torch.float16}, "f00d"),
        ({"kinds": GEOMETRY.kinds[:1] * 3}, "f00d"),
        ({"kinds": GEOMETRY.kinds[:1]}, "f00d"),
        ({"kinds": (CacheKind("full", 5, 3),) * 2}, "f00d"),
        ({"kinds": (CacheKind("sliding", 3, 5, 6),) * 2}, "f00d"),
    ],
)
def test_of_another_model_nothing_is_found(tmp_path, change, fingerprint):
    """Another model, dtype, block size or shape finds nothing and leaves what is there."""
    prompt = numbers(21)
    kept(tmp_path, prompt)
    with open_store(tmp_path, replace(GEOMETRY, **change), fingerprint) as store:
        assert store.find(prompt)[1] == 0
    with open_store(tmp_path) as store:
        assert found_right(store, prompt) == 21


def test_two_stores_at_once(tmp_path):
    """A second store reads what the first keeps, and grows in a directory of its own; a third
    finds what either kept.
    """
    one, other = numbers(21), numbers(30, 2)
    kept(tmp_path, one)
    with open_store(tmp_path) as first, open_store(tmp_path) as second:
        assert found_right(second, one) == 21
        add(second, second.new_sequence(), other)
        assert found_right(first, one) == 21
    for _ in range(2):
        for prompt in (one, other):
            with open_store(tmp_path) as store:
                assert found_right(store, prompt) == len(prompt)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_damage_is_not_found(data):
    """Whatever is cut or flipped in whatever file: the right bits, or nothing, and no crash; then
    the store works and keeps again.
    """
    first = numbers(21)
    second = torch.cat([first[:18], numbers(12, 3) + 60])
    with tempfile.TemporaryDirectory() as directory:
        kept(directory, first, second)
        (home,) = Path(directory).iterdir()
        for _ in range(data.draw(st.integers(1, 3))):
            path = data.draw(st.sampled_from(sorted(home.iterdir())))
            size = path.stat().st_size
            place = data.draw(st.integers(0, size) | st.integers(max(size - 900, 0), size))
            kind = data.draw(st.sampled_from(["cut", "flip", "extend", "zeros"]))
            with path.open("r+b") as file:
                if kind == "cut":
                    file.truncate(place)
                elif kind == "extend":
                    file.truncate(size + place)
                elif place < size:
                    file.seek(place)
                    old = file.read(64)
                    flipped = bytes([old[0] ^ (1 << data.draw(st.integers(0, 7)))])
                    file.seek(place)
                    file.write(bytes(len(old)) if kind == "zeros" else flipped)
        for prompt in (first, second, first):
            with open_store(directory) as store:
                found_right(store, prompt)
                found_right(store, prompt)
        third = numbers(17, 8)
        kept(directory, third)
        with open_store(directory) as store:
            assert found_right(store, third) == 17


@pytest.mark.parametrize("what", ["link", "fifo", "directory", "foreign", "open to others"])
def test_what_is_not_ours_is_left_alone(tmp_path, what):
    """A link, a pipe, somebody's file under our name: not used, not followed, not removed."""
    prompt = numbers(21)
    kept(tmp_path / "kv", prompt)
    (home,) = (tmp_path / "kv").iterdir()
    path = home / "layer-00001.kv"
    if what == "open to others":
        home.chmod(0o755)
    elif what == "foreign":
        path.write_bytes(b"somebody's")
    else:
        path.rename(tmp_path / "elsewhere")
        {"link": lambda: path.symlink_to(tmp_path / "elsewhere"), "fifo": lambda: os.mkfifo(path),
         "directory": path.mkdir}[what]()  # fmt: skip
    with open_store(tmp_path / "kv") as store:
        assert found_right(store, prompt) == 0
        add(store, store.new_sequence(), prompt)
    assert os.path.lexists(path)
    with open_store(tmp_path / "kv") as store:
        assert found_right(store, prompt) == 21


KILLED = """
import sys, torch
sys.path.insert(0, {tests!r})
from pathlib import Path
from kept_prefixes import add, numbers, open_store
for i in range(1000):
    with open_store({directory!r}) as store:
        prompt = numbers(60, i % 5)
        sequence, found = store.find(prompt)
        print(i, found, flush=True)
        add(store, sequence, torch.cat([prompt, numbers(20, i)]))
"""


def test_killed_at_any_moment(tmp_path):
    """A process that is killed while it writes leaves prefixes with the right bits, or none."""
    code = KILLED.format(tests=str(Path(__file__).parents[2]), directory=str(tmp_path))
    chance = random.Random(7)
    total = 0
    for _ in range(6):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(chance.randint(1, 4)):
            process.stdout.readline()
        time.sleep(chance.random() * 0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        for seed in range(5):
            with open_store(tmp_path) as store:
                total += found_right(store, numbers(60, seed))
        assert len(list(tmp_path.iterdir())) <= 1
    assert total > 0


def run(directory, prompt, kv_dir, **options):
    """Logits of the last token of a prompt and of a continuation, and the model's stats."""
    with ollm.load(directory, device="cpu", kv_dir=kv_dir, chunk_size=64, **options) as model:
        cache = model.new_cache()
        logits = [model(prompt[None], past_key_values=cache, logits_to_keep=1).logits]
        step = torch.tensor([[7]])
        logits += [model(step, past_key_values=cache).logits for _ in range(3)]
        return torch.cat(logits), model.stats


def test_another_config_finds_nothing(tiny, ids, tmp_path):
    """Keys depend on more than the weights: after a change of config.json nothing is found."""
    prompt = ids(300)
    run(tiny, prompt, tmp_path / "kv")
    assert run(tiny, prompt, tmp_path / "kv")[1].cached_tokens > 256
    path = tiny / "config.json"
    config = json.loads(path.read_text())
    config["rope_parameters"]["rope_theta"] *= 2
    path.write_text(json.dumps(config))
    assert run(tiny, prompt, tmp_path / "kv")[1].cached_tokens == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("attention", ["exact", "blockwise"])
def test_next_run_continues_bit_for_bit(tiny, ids, tmp_path, dtype, attention):
    """A second `ollm.load` computes only what is new, with the logits of a run that did not close;
    a third, of which all is kept, runs one token.
    """
    options = {"dtype": dtype, "attention": attention}
    document = ids(600)
    question = torch.cat([document, ids(30, seed=2)])
    with ollm.load(tiny, device="cpu", kv_dir=tmp_path / "a", chunk_size=64, **options) as model:
        cache = model.new_cache()
        model(document[None], past_key_values=cache)
        rest = question[None, 600:]
        expected = [model(rest, past_key_values=cache, logits_to_keep=1).logits]
        step = torch.tensor([[7]])
        expected += [model(step, past_key_values=cache).logits for _ in range(3)]
    run(tiny, document, tmp_path / "b", **options)  # with three more tokens
    found, stats = run(tiny, question, tmp_path / "b", **options)
    assert (stats.cached_tokens, stats.prefill_tokens) == (600, 30)
    assert torch.equal(found, torch.cat(expected))
    again, stats = run(tiny, question, tmp_path / "b", **options)
    assert (stats.cached_tokens, stats.prefill_tokens) == (629, 0)
    assert torch.allclose(again, found, atol=1e-4 if dtype == "float32" else 0.2)


def test_nothing_is_kept_unless_a_directory_is_named(tiny, ids, tmp_path, monkeypatch):
    """Not in the default directory, and not with keep_kv=False, which also looks for nothing."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    run(tiny, ids(300), None, kv="disk")
    assert list((tmp_path / "home/.cache/ollm/kv").iterdir()) == []
    run(tiny, ids(300), tmp_path / "kv", keep_kv=False)
    assert list((tmp_path / "kv").iterdir()) == []
    run(tiny, ids(300), tmp_path / "kv")
    assert run(tiny, ids(300), tmp_path / "kv", keep_kv=False)[1].cached_tokens == 0
    assert run(tiny, ids(300), tmp_path / "kv")[1].cached_tokens == 299


def test_all_logits_are_computed(tiny, ids, tmp_path):
    """Who asks for the logits of every position gets them, without what was kept."""
    run(tiny, ids(300), tmp_path)
    with ollm.load(tiny, device="cpu", kv_dir=tmp_path, chunk_size=64) as model:
        logits = model(ids(300)[None]).logits
        assert logits.shape[1] == 300
        assert model.stats.cached_tokens == 0


def test_generate_after_restoring(tiny, ids, tmp_path):
    """Greedy, beams, a left-padded batch and a second turn give the tokens of a run without."""
    prompts = [ids(300), torch.cat([ids(280), ids(9, seed=4)]), ids(40, seed=5)]
    batch = torch.zeros(3, 300, dtype=torch.long)
    mask = torch.zeros_like(batch)
    for row, prompt in enumerate(prompts):
        batch[row, 300 - len(prompt) :] = prompt
        mask[row, 300 - len(prompt) :] = 1

    def answers(model):
        cache = model.new_cache()
        first = model.generate(prompts[0][None], past_key_values=cache, max_new_tokens=5, **GREEDY)
        both = torch.cat([first[0], ids(20, seed=9)])
        yield first
        yield model.generate(both[None], past_key_values=cache, max_new_tokens=5, **GREEDY)
        cache.crop(-10)
        yield torch.tensor(cache.get_seq_length())
        cache.close()
        yield model.generate(prompts[1][None], num_beams=3, max_new_tokens=5, **GREEDY)
        yield model.generate(batch, attention_mask=mask, max_new_tokens=5, **GREEDY)

    with ollm.load(tiny, device="cpu", kv="host", chunk_size=64) as model:
        expected = list(answers(model))
    for _ in range(2):
        with ollm.load(tiny, device="cpu", kv_dir=tmp_path, chunk_size=64) as model:
            found = list(answers(model))
            assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
            cached = model.stats.cached_tokens
    assert cached >= 299 + 3 * 288 + 299 + 288


def test_damage_that_shows_in_the_pass(tiny, ids, tmp_path):
    """A block that is damaged in a late layer is noticed when it is read: the prompt is computed
    again, with the logits of a run that found nothing.
    """
    expected, _ = run(tiny, ids(600), tmp_path / "none")
    run(tiny, ids(600), tmp_path / "kv")
    (path,) = (tmp_path / "kv").glob("*/layer-00002.kv")
    with path.open("r+b") as file:
        file.seek(4096 + 1000)
        old = file.read(1)
        file.seek(4096 + 1000)
        file.write(bytes([old[0] ^ 1]))
    found, stats = run(tiny, ids(600), tmp_path / "kv")
    assert (stats.cached_tokens, stats.prefill_tokens) == (0, 600)
    assert torch.equal(found, expected)
    assert run(tiny, ids(600), tmp_path / "kv")[1].cached_tokens == 599


def test_a_failed_first_pass_leaves_the_cache_empty(tiny, ids, tmp_path):
    """Ctrl-C in a pass that began with a kept prefix: the same prompt can be given again."""
    run(tiny, ids(300), tmp_path)
    with ollm.load(tiny, device="cpu", kv_dir=tmp_path, chunk_size=64) as model:
        cache = model.new_cache()

        def interrupt(_):
            raise KeyboardInterrupt

        model.on_progress(interrupt)
        prompt = torch.cat([ids(300), ids(20, seed=3)])[None]
        with pytest.raises(KeyboardInterrupt):
            model(prompt, past_key_values=cache, logits_to_keep=1)
        model.on_progress(None)
        assert cache.get_seq_length() == cache.num_tokens(0) == 0
        model(prompt, past_key_values=cache, logits_to_keep=1)
        assert (cache.get_seq_length(), cache.num_tokens(0)) == (320, 320)
        assert model.stats.cached_tokens == 300
        work = [NewTokens(cache.rows[0], ids(3), 320)]
        model.engine.run(cache.store, work)  # tokens that the cache was not told of
    with ollm.load(tiny, device="cpu", kv_dir=tmp_path) as model:
        longer = torch.cat([prompt[0], ids(9)])[None]
        model(longer, logits_to_keep=1)
        assert model.stats.cached_tokens == 320
