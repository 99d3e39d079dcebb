"""Every option is said once, and takes the forms that users of transformers know."""

from __future__ import annotations

import inspect
import pydoc
import re
from dataclasses import FrozenInstanceError, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from options_table import options_page

import ollm
from ollm_core import InputError
from ollm_core.cli.main import cli
from ollm_core.cli.options import names_of
from ollm_core.option_fields import About, about, default_text
from ollm_core.options import OPTIONS, LoadOptions, ModelOptions, PlanOptions, takes
from ollm_core.planning.planner import Planner
from ollm_core.values import PathLike


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv": 3}, "there is no KV store 3"),
        ({"reader": None}, "there is no reading engine None"),
        ({"draft": ["lookup"]}, "there is no draft source"),
        ({"attention": True}, "attention is True"),
        ({"device_layers": 1.5}, "device_layers is 1.5"),
        ({"kv_dir": 3}, "3 is not a path"),
        ({"kv_dir": "a\0b"}, "is not a path"),
        ({"models_dir": b"x"}, "b'x' is not a path"),
        ({"draft": "lookup", "num_draft_tokens": "2"}, "num_draft_tokens is '2'"),
    ],
)
def test_wrong_options_of_load_are_one_line(tmp_path: Path, options: dict[str, Any], message: str):
    """Before the model is looked for."""
    with pytest.raises(InputError) as refused:
        ollm.load("no-such-model", **options)
    assert message in refused.value.message
    assert "\n" not in str(refused.value)


def test_a_model_takes_them_all(tiny: Path, tmp_path: Path, monkeypatch, ids):
    """And still computes what it did; the plan takes the same."""
    monkeypatch.chdir(tmp_path)
    same = {
        "dtype": torch.float32, "device": torch.device("cpu"), "device_memory": 2e8,
        "host_memory": np.int64(2 * 10**8), "chunk_size": np.int32(16),
        "device_layers": torch.tensor(2), "models_dir": tmp_path,
    }  # fmt: skip
    with ollm.load(tiny, device="cpu", chunk_size=16) as model:
        expected = model(ids(40)[None]).logits
    more = {"kv": "disk", "kv_dir": Path("kv"), "draft": "lookup", "num_draft_tokens": np.int8(3)}
    with ollm.load(Path(tiny.name), **same, **more) as model:
        assert torch.equal(model(ids(40)[None]).logits, expected)
        assert model.weights.resident.layer_limits.device == 2
    found = ollm.plan(Path(tiny.name), **same, context=np.int64(512), batch=np.int64(2))
    assert (found.dtype, found.device, found.batch, found.context) == ("float32", "cpu", 2, 512)
    assert found.device_memory == 200_000_000


@pytest.mark.parametrize(("function", "kind"), [(ollm.load, LoadOptions), (ollm.plan, PlanOptions)])
def test_every_option_is_a_keyword(function: Any, kind: type[ModelOptions]):
    """Of its function, as callers, editors and help() see it, with its default and its text."""
    _, *keywords = inspect.signature(function).parameters.values()
    assert [each.name for each in keywords] == [each.name for each in fields(kind)]
    text = " ".join(pydoc.render_doc(function, renderer=pydoc.plaintext).split())
    for option, keyword in zip(fields(kind), keywords, strict=True):
        assert keyword.kind is keyword.KEYWORD_ONLY
        assert keyword.default == option.default
        assert keyword.annotation == function.__annotations__[option.name] == option.type
        assert f"- `{option.name}`: {about(option).help}" in text
        assert f"Default: {default_text(option)}." in text


@pytest.mark.parametrize(
    "verb", ["run", "batch", "serve", "plan", "doctor", "convert", "import", "pull"]
)
def test_a_verb_has_a_flag_for_each_of_its_options(verb: str):
    """With that default, its choices, and its text; and for no other option."""
    command = cli.commands[verb]
    flags = {each.name: each for each in command.params if each.name in OPTIONS}
    own = {"doctor": {"dtype"}, "import": {"dtype"}, "run": {"profile"}}.get(verb, set())
    assert flags.keys() - own == set(names_of(verb))
    for name in names_of(verb):
        flag, option = flags[name], OPTIONS[name]
        assert isinstance(flag, click.Option)
        assert "--" + name.replace("_", "-") in flag.opts
        assert flag.default == option.default
        assert default_text(option) in (flag.help or "")
        for choice in about(option).choices:
            assert choice in flag.make_metavar(click.Context(command))


def test_every_option_is_told_whole():
    """It has a sentence, a default in words, a row in the table, and a verb or none on purpose."""
    rows = re.findall(r"^\| `(\w+)`(?: †)? \| (.+) \|$", options_page(), re.MULTILINE)
    assert sorted(name for name, _ in rows) == sorted(OPTIONS)
    assert {name for name in OPTIONS if not about(OPTIONS[name]).verbs} == {
        "registry", "on_progress", "profile", "rates",
    }  # fmt: skip
    for name, row in rows:
        known = about(OPTIONS[name])
        assert known.help.endswith(".")
        assert known.help in row
        assert default_text(OPTIONS[name])
        for other in re.findall(r"`([a-z]+(?:_[a-z]+)+)`", f"{known.help} {known.more}"):
            assert other in OPTIONS, f"{name} tells of {other}"


def test_a_new_option_is_one_field(tiny: Path):
    """A class with one field more is a keyword, a line of help() and a check more."""

    @dataclass(frozen=True, kw_only=True)
    class More(PlanOptions):
        colour: str = field(default="red", metadata={"about": About("Colour.", check=no_blue)})

    def shown(path_or_id: PathLike, options: More) -> str:
        """Show a model."""
        return f"{path_or_id} in {options.colour}, {options.batch}"

    keywords = takes(More)(shown)
    assert keywords("m", colour="green", batch=2) == "m in green, 2"
    assert inspect.signature(keywords).parameters["colour"].default == "red"
    with pytest.raises(InputError, match="colour is 'blue'"):
        keywords("m", colour="blue")


def no_blue(name: str, value: str) -> str:
    """A check that refuses one value."""
    if value == "blue":
        raise InputError(f"{name} is {value!r}")
    return value


def test_an_unknown_option_names_the_function(tiny: Path):
    """And not the class of its options."""
    with pytest.raises(TypeError, match=r"load\(\) got an unexpected keyword argument 'colour'"):
        ollm.load(tiny, colour="red")
    with pytest.raises(TypeError, match=r"plan\(\) too many positional arguments"):
        ollm.plan(tiny, "cpu")


def test_options_are_kept_in_one_form(tmp_path: Path, monkeypatch):
    """Checked when they are made; two that say the same are equal."""
    monkeypatch.chdir(tmp_path)
    said = LoadOptions(dtype=torch.float32, device=-1, device_memory="2GB", kv_dir="kv")
    same = LoadOptions(
        dtype="float32", device="cpu", device_memory=2 * 10**9, kv_dir=tmp_path / "kv"
    )
    assert said == same
    assert (said.device_memory, said.dtype) == (2_000_000_000, "float32")
    with pytest.raises(FrozenInstanceError):
        said.kv = "disk"  # type: ignore[misc]


def test_a_planner_keeps_its_model(tiny: Path):
    """Other options may differ in what is run, and not in what model it is."""
    planner = Planner(tiny, PlanOptions(device="cpu", dtype="float32"))
    assert planner.plan(replace(planner.options, batch=2), compare=False).batch == 2
    with pytest.raises(ValueError, match="dtype is that of the planner: 'float32'"):
        planner.plan(replace(planner.options, dtype="bfloat16"))
