"""`ollm config show`: values, and who has set them."""

from __future__ import annotations

import json

import pytest
from one_line import is_one_line_error


@pytest.fixture(autouse=True)
def nowhere(home, tmp_path, monkeypatch):
    """A directory without files."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_all_verbs(ollm, nowhere):
    """An option is told once, or for each verb where they differ; defaults in words."""
    (nowhere / "ollm.toml").write_text('precision = "exact"\n[ask]\nkv = "disk"\n')
    code, out, err = ollm("config", "show", "--origin")
    rows = {line.split()[0]: line for line in out.splitlines()}
    assert code == 0
    assert rows["precision"].split() == ["precision", "exact", f"{nowhere}/ollm.toml:1"]
    assert rows["ask.kv"].split() == ["ask.kv", "disk", f"{nowhere}/ollm.toml:3"]
    assert rows["run.kv"].split() == ["run.kv", "auto", "default"]
    assert "(no limit)" in rows["kv_budget"]
    assert rows["top_p"].split() == ["top_p", "(none)", "default"]
    assert rows["keep_kv"].split() == ["keep_kv", "on", "default"]
    assert f"files: {nowhere}/ollm.toml" in err
    assert "SET BY" not in ollm("config", "show")[1]


def test_a_verb_as_json(ollm):
    """Its options alone, with what click would give its function."""
    code, out, _ = ollm("config", "show", "plan", "--json")
    told = json.loads(out)
    assert code == 0
    assert {one["verb"] for one in told["options"]} == {"plan"}
    assert {"verb": "plan", "option": "batch", "value": 1, "origin": "default"} in told["options"]
    assert told["files"] == []


def test_a_verb_without_options(ollm):
    """Is told, with those that have some."""
    code, out, err = ollm("config", "show", "plugins")
    assert (code, out) == (2, "")
    assert is_one_line_error(err)
    assert "run" in err
