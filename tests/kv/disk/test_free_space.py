"""A disk without room for KV: refused before the first token where that can be told, else when it
shows; one line, and nothing is left behind.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
from contextlib import contextmanager

import pytest
import torch

import ollm
from ollm_core import DoesNotFitError
from ollm_core.cli.main import main
from ollm_core.kv.disk.free_space import free_bytes

LAYER_BYTES = 2 * 2 * 256 * 16 * 4  # a block of the tiny model: K and V, heads, tokens, float32
NUM_LAYERS = 3


@contextmanager
def files_of_at_most(num_bytes):
    """The kernel refuses to let any file of this process grow past that (EFBIG)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def free_is(monkeypatch):
    """Lets every file system tell so many free bytes."""

    def say(num_bytes):
        there = tuple(os.statvfs("/"))  # bsize, frsize, blocks, bfree, bavail, ...
        told = os.statvfs_result((4096, 4096, *there[2:4], num_bytes // 4096, *there[5:10]))
        monkeypatch.setattr(os, "statvfs", lambda _: told)

    return say


def generate(model, prompt, num_new):
    return model.generate(prompt[None], max_new_tokens=num_new, do_sample=False, eos_token_id=None)


def test_refused_before_the_first_token(tiny, ids, tmp_path, free_is):
    """The prompt fits, the new tokens do not: nothing is computed, nothing written, nothing held
    for it. With a page more there is no refusal.
    """
    kv_dir = tmp_path / "kv"
    needed = 4 * NUM_LAYERS * LAYER_BYTES
    with ollm.load(tiny, device="cpu", device_memory="50MB", kv="disk", kv_dir=kv_dir) as model:
        free_is(needed - 4096)
        with pytest.raises(DoesNotFitError) as refused:
            generate(model, ids(900), 100)
        error = refused.value
        assert error.message.startswith("KV cache of 999 tokens: need 786 kB in ")
        assert error.message.endswith("have 782 kB free")
        assert error.hint.startswith("free 4096 bytes, ")
        assert model.stats.weight_passes == 0
        assert not kv_dir.exists()
        assert model.accounts.host.used == 0
        free_is(needed)
        assert generate(model, ids(1000), 25).shape == (1, 1025)  # the last is not stored


def test_padding_and_beams_need_less(tiny, ids, tmp_path, free_is):
    """Padding is not stored, beams share their prompt: neither is refused for what it would take
    otherwise.
    """
    prompts = torch.zeros(4, 300, dtype=torch.int64)
    mask = torch.zeros_like(prompts)
    prompts[0], mask[0] = ids(300), 1
    prompts[1:, -5:], mask[1:, -5:] = ids(5), 1
    options = {"max_new_tokens": 2, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    free_is(2 * NUM_LAYERS * LAYER_BYTES)
    with ollm.load(
        tiny, device="cpu", device_memory="50MB", kv="disk", kv_dir=tmp_path / "kv"
    ) as model:
        assert model.generate(prompts, attention_mask=mask, **options).shape == (4, 302)
        assert model(input_ids=prompts, attention_mask=mask).logits.shape[:2] == (4, 300)
        beams = model.generate(prompts[:1], num_beams=4, **options)
        assert beams.shape == (1, 302)


def test_what_is_kept_counts_as_room(tiny, ids, tmp_path, free_is):
    """A prompt whose KV lies there already needs no room for it."""
    prompt = ids(600)
    options = {"device": "cpu", "device_memory": "50MB", "kv": "disk", "kv_dir": tmp_path / "kv"}
    with ollm.load(tiny, **options) as model:
        expected = generate(model, prompt, 4)
    free_is(0)
    with ollm.load(tiny, **options) as model:
        assert torch.equal(generate(model, prompt, 4), expected)
        assert model.stats.cached_tokens > 500


@pytest.mark.parametrize("keep", [True, False])
def test_a_limit_that_shows_while_it_runs(tiny, ids, tmp_path, keep):
    """The file of a layer may not grow to a second block. One error; the cache is as before it,
    and closing gives back files, memory and accounts.
    """
    kv_dir = tmp_path / "kv"
    with files_of_at_most(4096 + LAYER_BYTES):
        model = ollm.load(
            tiny, device="cpu", device_memory="50MB", kv="disk", kv_dir=kv_dir, keep_kv=keep
        )
        cache = model.new_cache()
        logits = model(input_ids=ids(250)[None], past_key_values=cache, logits_to_keep=1).logits
        token = logits[:, -1].argmax(-1)[:, None]
        for _ in range(6):
            model(input_ids=token, past_key_values=cache)
        with pytest.raises(DoesNotFitError, match=r"which is not allowed: File too large\. hint: "):
            model(input_ids=token, past_key_values=cache)
        assert cache.get_seq_length() == 256
        cache.close()
        model.close()
    assert model.accounts.host.used == model.accounts.device.used == 0
    left = [path for path in kv_dir.rglob("*") if path.is_file()]
    assert all(keep for _ in left)
    with ollm.load(
        tiny, device="cpu", device_memory="50MB", kv="disk", kv_dir=kv_dir, keep_kv=keep
    ) as model:
        assert generate(model, ids(300), 3).shape[1] == 303


def test_as_a_user_sees_it(make_llama, smollm2, tmp_path, capsys, free_is):
    """`ollm run`: exit code 3, one line and a hint, an empty directory; whether it is told at the
    start or shows later.
    """
    vocab_size = json.loads((smollm2 / "config.json").read_text())["vocab_size"]
    directory = make_llama(torch.bfloat16, vocab_size=vocab_size)
    for path in smollm2.glob("tokenizer*"):
        shutil.copy(path, directory)
    kv_dir = tmp_path / "kv"
    capsys.readouterr()  # transformers told that it wrote
    arguments = [
        "run", str(directory), "--prompt", "word " * 300, "--raw", "--max-new-tokens", "600",
        "--device", "cpu", "--device-memory", "100MB", "--kv", "disk", "--kv-dir", str(kv_dir),
    ]  # fmt: skip
    with files_of_at_most(LAYER_BYTES), pytest.raises(SystemExit) as late:
        main(arguments)
    out, err = capsys.readouterr()
    assert late.value.code == 3
    assert not out
    assert err.splitlines()[0].startswith("error: KV cache: need ")
    assert len(err.splitlines()) == 2
    assert list(kv_dir.iterdir()) == []
    free_is(50_000)
    with pytest.raises(SystemExit) as early:
        main(arguments)
    _, err = capsys.readouterr()
    assert early.value.code == 3
    assert err.splitlines()[0].endswith("have 49.2 kB free")
    assert list(kv_dir.iterdir()) == []


def test_a_directory_that_is_not_there_yet(tmp_path):
    """Its file system is that of the nearest one that is."""
    assert free_bytes(tmp_path / "a" / "b") > 0
