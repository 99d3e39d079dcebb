"""Weights that change, between two runs and under one: never a token that no model would say."""

from __future__ import annotations

import os
import shutil

import pytest
import torch

import ollm
from ollm_core import ReadError
from ollm_core.checkpoint import SINGLE_FILE, open_checkpoint

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


def test_a_draft_model_that_changes(make_llama, ids):
    """It guesses no more: the text ends with a ReadError that names its file."""
    main, draft = make_llama(name="main"), make_llama(name="draft", seed=1)
    options = {"draft": "model", "draft_model": draft, "num_draft_tokens": 3}
    with ollm.load(main, device="cpu", **options) as model:
        assert model.generate(ids(20)[None], max_new_tokens=6, **GREEDY).shape[1] == 26
        middle_reversed(draft / SINGLE_FILE)
        with pytest.raises(ReadError, match="draft/model"):
            model.generate(ids(20)[None], max_new_tokens=6, **GREEDY)
