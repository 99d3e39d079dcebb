"""The predecessor's scripts run unchanged."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from ollm import AutoInference, Inference, TextStreamer, file_get_contents
from ollm_core import InputError, UnknownModelError
from ollm_core.errors import DeviceError

MESSAGES = [
    {"role": "system", "content": "You are helpful AI assistant"},
    {"role": "user", "content": "List planets"},
]


@pytest.fixture
def tiny_with_tokenizer(make_llama, smollm2):
    """A tiny model that has SmolLM2's tokenizer and chat template."""
    vocab_size = json.loads((smollm2 / "config.json").read_text())["vocab_size"]
    directory = make_llama(torch.bfloat16, name="models/tiny", vocab_size=vocab_size)
    for path in [*smollm2.glob("tokenizer*"), *smollm2.glob("*.jinja")]:
        shutil.copy(path, directory)
    return directory


def test_the_script_runs_unchanged(tiny_with_tokenizer, tmp_path, capsys):
    """The example of the predecessor's README, word for word but for model and directories."""
    device = "cpu"
    o = AutoInference(tiny_with_tokenizer, device=device, logging=True)
    o.offload_layers_to_cpu(layers_num=2)
    past_key_values = o.DiskCache(cache_dir=str(tmp_path / "kv_cache"))
    text_streamer = TextStreamer(o.tokenizer, skip_prompt=True, skip_special_tokens=False)
    input_ids = o.tokenizer.apply_chat_template(
        MESSAGES,
        reasoning_effort="minimal",
        tokenize=True,
        add_generation_prompt=True,
        return_tensors="pt",
    ).to(o.device)
    outputs = o.model.generate(
        input_ids=input_ids,
        past_key_values=past_key_values,
        max_new_tokens=5,
        streamer=text_streamer,
    ).cpu()
    answer = o.tokenizer.decode(outputs[0][input_ids.shape[-1] :], skip_special_tokens=False)
    assert answer.strip()
    assert answer.strip() in capsys.readouterr().out
    assert past_key_values.get_seq_length() == outputs.shape[1] - 1
    assert o.model.stats.kv_tier == "disk"
    o.model.close()
    assert list((tmp_path / "kv_cache").iterdir()) == []


def test_by_id(smollm2, tmp_path):
    """`Inference` takes an id and looks for it in `models_dir`."""
    (tmp_path / "smollm2-135M").symlink_to(smollm2, target_is_directory=True)
    o = Inference("smollm2-135M", device="cpu", logging=False, device_memory="200MB")
    o.ini_model(models_dir=tmp_path, force_download=False)
    ids = o.tokenizer("The capital of France is", return_tensors="pt").input_ids
    with o.model as model:
        text = o.tokenizer.decode(model.generate(ids, max_new_tokens=3, do_sample=False)[0])
        assert "Paris" in text
        assert model.accounts.device.limit == 200_000_000


def test_disk_cache_deletes_nothing_of_others(tiny_with_tokenizer, tmp_path):
    """A directory that was there before, and what is in it, is there afterwards."""
    (tmp_path / "kv_cache").mkdir()
    (tmp_path / "kv_cache" / "thesis.txt").write_text("only copy")
    o = AutoInference(tiny_with_tokenizer, device="cpu")
    o.DiskCache(cache_dir=tmp_path / "kv_cache").close()
    o.model.close()
    assert (tmp_path / "kv_cache" / "thesis.txt").read_text() == "only copy"


def test_wrong_use(tiny_with_tokenizer, tmp_path):
    """A device that is not there names what is; an unknown id and a negative count are refused."""
    with pytest.raises(DeviceError, match="cuda:77") as refused:
        AutoInference(tiny_with_tokenizer, device="cuda:77")
    assert refused.value.hint == "one of: cpu"
    with pytest.raises(UnknownModelError):
        Inference("llama9-1T-chat", device="cpu").ini_model(models_dir=tmp_path)
    o = AutoInference(tiny_with_tokenizer, device="cpu")
    with pytest.raises(InputError, match="layers_num is -1"):
        o.offload_layers_to_cpu(-1)
    o.model.close()


def test_file_get_contents(tmp_path):
    """Text of a UTF-8 file."""
    (tmp_path / "a.txt").write_text("naïve", encoding="utf-8")
    assert file_get_contents(str(tmp_path / "a.txt")) == "naïve"
