"""docs/configuration.md: its files are taken, and it names all that a project may not set."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from ollm_core.cli.main import cli, main
from ollm_core.cli.settings import settings_of

PAGE = (Path(__file__).parents[2] / "docs/configuration.md").read_text()


def test_its_files_are_taken(home, tmp_path, monkeypatch, capsys):
    """The first as a project's, the second as the user's."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ollm").mkdir()
    mine = tmp_path / "ollm/config.toml"
    mine.touch(0o600)
    (tmp_path / "ollm.toml").write_text(re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)[0])
    mine.write_text(re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)[1])
    with pytest.raises(SystemExit) as ended:
        main(["config", "show", "--json"])
    told = json.loads(capsys.readouterr().out)
    set_there = {one["option"] for one in told["options"] if one["origin"] != "default"}
    assert ended.value.code == 0
    assert set_there == {
        "device_memory", "precision", "max_new_tokens", "max_requests", "temperature", "kv_dir",
        "api_key",
    }  # fmt: skip


def test_what_a_project_may_not_set():
    """The page names each such option, and no other, in its section."""
    section = PAGE.split("\n## A project's file is not yours\n")[1].split("\n## ")[0]
    told = set(re.findall(r"`(\w+)`", section)) - {"ollm"}
    verbs = settings_of(cli).values()
    assert told == {
        key for settings in verbs for key, one in settings.items() if one.known.user_only
    }
