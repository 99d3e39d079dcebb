"""Weights that change, between two runs and under one: never a token that no model would say."""

from __future__ import annotations

import os
import shutil

import pytest
import torch

import ollm
from ollm_core import ReadError
from ollm_core.checkpoint.safetensors import SINGLE_FILE, open_checkpoint

WIDE = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6}
GREEDY = {"do_sample": False, "eos_token_id": None}


def middle_reversed(path, names=None):
    """Reverse the middle half of every tensor (or of those named) of a float32 file, in place:
    size, header, ends and modification time stay.
    """
    status = path.stat()
    with path.open("r+b") as file:
        for name, info in open_checkpoint(path.parent).tensors.items():
            if names and name not in names:
                continue
            count = info.num_bytes // 4
            start, num = info.offset + count // 4 * 4, count // 2
            file.seek(start)
            numbers = torch.frombuffer(bytearray(file.read(4 * num)), dtype=torch.int32)
            file.seek(start)
            file.write(numbers.flip(0).numpy().tobytes())
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def run(directory, prompt, kv_dir, **options):
    """The last logits of a prompt, and how many of its tokens were found."""
    with ollm.load(directory, device="cpu", kv_dir=kv_dir, **options) as model:
        logits = model(prompt[None], logits_to_keep=1).logits
        return logits, model.stats.cached_tokens


def test_kv_of_other_weights_is_not_found(tiny, ids, tmp_path):
    """Another checkpoint on the same directory, equal in headers, sizes, times and the ends of all
    tensors, or the same file written over: nothing is found, until the first is there again.
    """
    prompt, kv_dir, other = ids(300), tmp_path / "kv", tmp_path / "other"
    shutil.copytree(tiny, other)
    middle_reversed(other / SINGLE_FILE, ["model.layers.1.mlp.up_proj.weight"])
    first, _ = run(tiny, prompt, kv_dir)
    assert run(tiny, prompt, kv_dir)[1] == 299
    found, cached = run(other, prompt, kv_dir)
    assert cached == 0
    assert torch.equal(found, run(other, prompt, None)[0])
    assert not torch.allclose(found, first, atol=1e-3)
    middle_reversed(tiny / SINGLE_FILE, ["model.layers.1.mlp.up_proj.weight"])
    found_there, cached = run(tiny, prompt, kv_dir)
    assert cached == 299  # of the other one, which this file is now
    assert torch.allclose(found_there, found, atol=1e-4)
    middle_reversed(tiny / SINGLE_FILE)
    assert run(tiny, prompt, kv_dir)[1] == 0


def test_files_are_hashed_only_for_kv_that_stays(tiny, ids, tmp_path):
    """And once: the second cache of a model knows them. Progress tells of every byte."""
    seen = []
    size = (tiny / SINGLE_FILE).stat().st_size

    def checks():
        steps = [(p.steps_done, p.steps_total) for p in seen if p.stage == "check"]
        seen.clear()
        return steps

    options = {"device": "cpu", "kv_dir": tmp_path, "on_progress": seen.append}
    for unkept in ({"kv": "device"}, {"kv": "disk", "keep_kv": False}):
        with ollm.load(tiny, **options, **unkept) as model:
            model(ids(9)[None])
        assert checks() == []
    with ollm.load(tiny, **options) as model:
        model(ids(9)[None])
        assert checks() == [(0, size), (size, size)]
        model(ids(9)[None])
        assert checks() == []


def written_over(path):
    middle_reversed(path)


def replaced(path):
    shutil.copyfile(path, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


@pytest.mark.parametrize("reader", ["direct", "mmap"])
@pytest.mark.parametrize(("memory", "change"), [("12MB", written_over), ("1GB", written_over),
                                                ("12MB", replaced)])  # fmt: skip
def test_weights_that_change_under_a_run(make_llama, ids, memory, change, reader):
    """Streamed or all in memory, written over or replaced: the pass is a ReadError and the cache is
    as before; so is every later one, until the model is opened again.
    """
    directory = make_llama(**WIDE)
    prompt = ids(40)[None]
    options = {"device": "cpu", "device_memory": memory, "reader": reader}
    with ollm.load(directory, **options) as model:
        cache = model.new_cache()
        model(prompt, past_key_values=cache)
        change(directory / SINGLE_FILE)
        for _ in range(2):
            with pytest.raises(ReadError, match="changed while the model was open"):
                model(prompt[:, :2], past_key_values=cache)
            assert cache.get_seq_length() == cache.store.num_tokens(cache.rows[0]) == 40
        with pytest.raises(ReadError, match="open the model again"):
            model.generate(prompt, max_new_tokens=2, **GREEDY)
    with ollm.load(directory, **options) as model:
        assert model.generate(prompt, max_new_tokens=2, **GREEDY).shape[1] == 42


def test_kv_of_a_pass_on_changed_weights_is_not_kept(tiny, ids, tmp_path):
    """What a pass computed before the change was noticed is in no kept prefix."""
    prompt = ids(600)
    with ollm.load(tiny, device="cpu", kv_dir=tmp_path / "kv") as model:
        cache = model.new_cache()
        model(prompt[None, :300], past_key_values=cache, logits_to_keep=1)
        middle_reversed(tiny / SINGLE_FILE)
        with pytest.raises(ReadError):
            model(prompt[None, 300:], past_key_values=cache, logits_to_keep=1)
    assert run(tiny, prompt, tmp_path / "kv")[1] == 0
    middle_reversed(tiny / SINGLE_FILE)
    assert run(tiny, prompt, tmp_path / "kv")[1] == 300


def test_a_draft_model_that_changes(make_llama, ids):
    """It guesses no more: the text ends with a ReadError that names its file."""
    main, draft = make_llama(name="main"), make_llama(name="draft", seed=1)
    options = {"draft": "model", "draft_model": draft, "num_draft_tokens": 3}
    with ollm.load(main, device="cpu", **options) as model:
        assert model.generate(ids(20)[None], max_new_tokens=6, **GREEDY).shape[1] == 26
        middle_reversed(draft / SINGLE_FILE)
        with pytest.raises(ReadError, match="draft/model"):
            model.generate(ids(20)[None], max_new_tokens=6, **GREEDY)
