"""`ollm list-models`: a table that fits a terminal, what is on disk anywhere, near names."""

from __future__ import annotations

import json
import shutil

import pytest

from ollm_core.cli.main import main

FIELDS = {
    "id", "aliases", "adapter", "distribution", "repo", "license", "num_parameters", "weight_bytes",
    "config_known", "on_disk", "places", "fits", "unsupported", "path",
}  # fmt: skip
VERDICTS = {
    "in memory", "streamed", "no: memory", "no: disk", "quantised", "no adapter", "unknown",
}  # fmt: skip


@pytest.fixture
def listed(capsys, monkeypatch, tmp_path):
    """Runs the verb where nothing is on disk but what a test puts there."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("OLLM_MODELS", str(tmp_path / "root"))
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        with pytest.raises(SystemExit) as end:
            main(["list-models", *arguments])
        captured = capsys.readouterr()
        return int(end.value.code or 0), captured.out, captured.err

    return run


def test_json_and_table(listed):
    """All fields of every model; a table that 80 columns hold, in the order of sizes."""
    code, out, err = listed("--json")
    assert (code, err) == (0, "")
    models = json.loads(out)["models"]
    assert all(model.keys() == FIELDS for model in models)
    assert {model["fits"] for model in models} <= VERDICTS
    assert not any(model["on_disk"] for model in models)
    by_id = {model["id"]: model for model in models}
    assert by_id["llama3-8B-chat"]["aliases"] == ["llama3.1:8b", "llama3.1"]
    assert by_id["llama3-8B-chat"]["repo"] == "meta-llama/Llama-3.1-8B-Instruct"
    _, table, _ = listed()
    rows, foot = table.split("\n\n")
    assert [row.split()[0] for row in rows.splitlines()[1:]] == [model["id"] for model in models]
    assert max(map(len, table.splitlines())) <= 80
    assert "ollm plan MODEL" in foot
    smol = [model["id"] for model in models if model["id"].startswith("smollm2-")]
    assert smol[0] == "smollm2-135M"
    assert smol == sorted(smol, key=lambda one: by_id[one]["weight_bytes"])
    sizes = [model["id"] for model in models if model["id"].startswith("llama3-")]
    assert sizes == ["llama3-1B-chat", "llama3-3B-chat", "llama3-8B-chat", "llama3-405B-chat"]


def test_what_is_on_disk_comes_first(listed, make_llama, tmp_path):
    """In each place, under the name that opens it; a catalog's model under its id."""
    tiny = make_llama()
    for place in ("root/mine", "root/someone/theirs", "models/here", "root/llama3-8B-chat"):
        shutil.copytree(tiny, tmp_path / place)
    models = json.loads(listed("--json")[1])["models"]
    on_disk = {m["id"]: (m["places"][0]["place"], m["fits"]) for m in models if m["on_disk"]}
    assert on_disk == {
        "llama3-8B-chat": ("models", "in memory"),
        "mine": ("models", "in memory"),
        "models/here": ("./models", "in memory"),
        "someone/theirs": ("models", "in memory"),
    }
    assert [model["on_disk"] for model in models[:5]] == [True] * 4 + [False]
    (named,) = (model for model in models if model["id"] == "llama3-8B-chat")
    assert named["weight_bytes"] < 10**6  # what is there, and not what the catalog says
    assert "someone/theirs" in listed()[1].splitlines()[4]


def test_words_and_near_names(listed):
    """A word chooses; one that nothing has is answered with what may be meant."""
    for word, expected in (("LLAMA3.1:8B", "llama3-8B-chat"), ("openai/", "gpt-oss-20B")):
        code, out, _ = listed(word)
        assert code == 0
        assert out.splitlines()[1].split()[0] == expected
    code, out, err = listed("lamma3.1:8b")
    assert (code, out) == (4, "")
    assert "hint: did you mean llama3.1:8b or " in err
    assert "did you mean llama3.1:8b?" in listed("llama3.1:8b-instruct-q4_K_M")[2]
