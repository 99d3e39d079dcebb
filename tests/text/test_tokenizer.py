"""Tokenizers open without code of the checkpoint, without a question and without a network."""

import io
import json
import os
import shutil
import socket
import sys

import pytest

import ollm
from ollm_core import ConfigError, InputError
from ollm_core.cli.main import main
from ollm_core.convert.gguf.importer import import_gguf
from ollm_core.text.tokenizer import MAX_VOCABULARY_BYTES, open_tokenizer

CANARY = """
from pathlib import Path
Path({marker!r}).write_text("ran")
from transformers import PreTrainedTokenizerFast
class Canary(PreTrainedTokenizerFast):
    pass
def generate(*_, **__):
    raise SystemExit("custom code")
"""


@pytest.fixture
def directory(smollm2, tmp_path):
    """SmolLM2's tokenizer, without weights."""
    made = tmp_path / "model"
    made.mkdir()
    for path in [*smollm2.glob("tokenizer*"), smollm2 / "config.json"]:
        shutil.copy(path, made)
    return made


def edit(path, **fields):
    said = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(said | fields))


def plant(directory, marker):
    """Code in every place of which a file may speak, and files that speak of it."""
    code = CANARY.format(marker=str(marker))
    (directory / "custom_generate").mkdir()
    for name in ("canary.py", "tokenization_canary.py", "custom_generate/generate.py"):
        (directory / name).write_text(code)
    classes = ("AutoConfig", "AutoModelForCausalLM", "AutoModel", "AutoProcessor", "AutoTokenizer")
    auto_map = {name: "canary.Canary" for name in classes}
    for name in ("config", "processor_config", "preprocessor_config", "generation_config"):
        fields = {"auto_map": auto_map, "processor_class": "Canary"}
        edit(directory / f"{name}.json", **fields, custom_generate="custom_generate")


@pytest.fixture
def answers(monkeypatch):
    """What would answer a question with yes; and a network that is not there."""

    def refuse(*_):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 100))
    return sys.stdin


MAP = {"AutoTokenizer": ["canary.Canary", "canary.Canary"]}


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"auto_map": MAP, "tokenizer_class": "TokenizersBackend"}, 0),
        ({"auto_map": MAP, "tokenizer_class": "GPT2TokenizerFast"}, 0),
        ({"tokenizer_class": "Canary"}, 0),
        ({"auto_map": MAP, "tokenizer_class": "Canary"}, 2),
        ({"auto_map": MAP, "tokenizer_class": None}, 2),
        ({"auto_map": ["canary.Canary", None], "tokenizer_class": "Canary"}, 2),
        ({"auto_map": {"AutoTokenizer": ["x/y--canary.Canary", None]}, "tokenizer_class": "C"}, 2),
        ({"auto_map": 7, "tokenizer_class": "Canary"}, 2),
        ({"tokenizer_class": "AutoModelForCausalLM"}, 2),
        ({"tokenizer_class": "AutoTokenizer"}, 2),
        ({"tokenizer_class": "RagTokenizer"}, 2),
        ({"tokenizer_class": "canary.Canary"}, 0),
        ({"tokenizer_class": ["Canary"]}, 2),
    ],
)
def test_no_code_of_a_checkpoint_runs(speaking, tmp_path, answers, capsys, fields, code):
    """`ollm run` on a directory full of code: none of it runs, nothing is asked or fetched. The
    tokenizer opens by a class of transformers, or there is one line.
    """
    plant(speaking, tmp_path / "marker")
    edit(speaking / "tokenizer_config.json", **fields)
    before = set(sys.modules)
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["run", str(speaking), "--prompt", "Hi", "--max-new-tokens", "1", "--device", "cpu"])
    captured = capsys.readouterr()
    assert int(ended.value.code or 0) == code, captured.err
    assert not (tmp_path / "marker").exists()
    assert not [name for name in set(sys.modules) - before if "canary" in name]
    assert answers.tell() == 0
    if code:
        assert len(captured.err.splitlines()) <= 2
        assert "tokenizer_config.json" in captured.err


def test_a_class_named_by_config_json(directory):
    """config.json may name a tokenizer class too, and is held to the same."""
    edit(directory / "config.json", tokenizer_class="AutoModelForCausalLM")
    with pytest.raises(ConfigError, match="`tokenizer_class` 'AutoModelForCausalLM'"):
        open_tokenizer(directory)


def test_code_runs_by_the_word_of_the_user(directory, tmp_path, answers, monkeypatch):
    """With `trust_remote_code` the tokenizer's code runs, without a question; nothing but True
    and False is taken for it.
    """
    modules = tmp_path / "modules"
    for name in ("dynamic_module_utils", "utils.hub"):
        monkeypatch.setattr(f"transformers.{name}.HF_MODULES_CACHE", str(modules))
    monkeypatch.setattr(sys, "path", [*sys.path])
    plant(directory, tmp_path / "marker")
    (directory / "config.json").write_text('{"model_type": "llama"}')
    edit(directory / "tokenizer_config.json", auto_map=MAP, tokenizer_class="Canary")
    assert type(open_tokenizer(directory, trust_remote_code=True)).__name__ == "Canary"
    assert (tmp_path / "marker").exists()
    assert answers.tell() == 0
    with pytest.raises(InputError, match="trust_remote_code is 'no'"):
        ollm.load(directory, trust_remote_code="no")


def test_an_import_runs_no_code_beside_the_file(directory, tmp_path, answers):
    """A GGUF file in a directory whose tokenizer is code: what lies beside it is not opened."""
    plant(directory, tmp_path / "marker")
    edit(directory / "tokenizer_config.json", auto_map=MAP, tokenizer_class="Canary")
    (directory / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(InputError, match="truncated or damaged"):
        import_gguf(directory / "model.gguf", tmp_path / "out")
    assert not (tmp_path / "marker").exists()
    assert answers.tell() == 0


def as_vocabulary_and_merges(directory):
    model = json.loads((directory / "tokenizer.json").read_text())["model"]
    (directory / "tokenizer.json").unlink()
    (directory / "vocab.json").write_text(json.dumps(model["vocab"]))
    lines = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (directory / "merges.txt").write_text("\n".join(["#version: 0.2", *lines, ""]))


def test_other_files(directory):
    """tokenizer.json alone, or vocab.json and merges.txt with a class that reads them."""
    expected = open_tokenizer(directory)("Hello there, you two").input_ids
    (directory / "tokenizer_config.json").unlink()
    assert open_tokenizer(directory)("Hello there, you two").input_ids == expected
    as_vocabulary_and_merges(directory)
    with pytest.raises(ConfigError, match="cannot be opened"):  # nothing says which class
        open_tokenizer(directory)
    edit(directory / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")
    assert open_tokenizer(directory)("Hello there, you two").input_ids == expected
    (directory / "merges.txt").unlink()
    with pytest.raises(ConfigError, match="cannot be opened"):
        open_tokenizer(directory)


def test_none(directory):
    """Without a vocabulary there is no tokenizer, and token ids are enough to run a model."""
    (directory / "tokenizer.json").unlink()
    assert open_tokenizer(directory) is None


def test_no_vocabulary(directory):
    """A class that makes do without its files is refused: it would encode nothing."""
    (directory / "tokenizer.json").rename(directory / "vocab.txt")
    edit(directory / "tokenizer_config.json", tokenizer_class="LlamaTokenizer")
    with pytest.raises(ConfigError, match="no vocabulary"):
        open_tokenizer(directory)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_larger_than_any(directory, name):
    """A file of a size that no tokenizer has is refused unread."""
    (directory / name).touch()
    os.truncate(directory / name, MAX_VOCABULARY_BYTES + 1)
    with pytest.raises(ConfigError, match=name):
        open_tokenizer(directory)


@pytest.mark.parametrize("content", ["", "{", "[]", "[" * 99_999, '{"model": ' * 50_000, "\xff"])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_damaged(directory, name, content):
    """Each damage is a ConfigError of one line that names the directory."""
    (directory / name).write_text(content, encoding="latin-1")
    with pytest.raises(ConfigError) as refused:
        open_tokenizer(directory)
    assert str(directory) in refused.value.message
    assert "\n" not in refused.value.message


def test_not_a_regular_file(directory):
    """A pipe in place of a file does not make it wait for ever."""
    (directory / "tokenizer_config.json").unlink()
    os.mkfifo(directory / "tokenizer_config.json")
    with pytest.raises(ConfigError, match="regular"):
        open_tokenizer(directory)
