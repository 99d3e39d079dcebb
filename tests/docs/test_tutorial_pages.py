"""docs/tutorial.md and docs/clients.md, done as they say, with a tiny model of the model's name."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

from ollm_core.cli.main import main

ROOT = Path(__file__).parents[2]
TUTORIAL = (ROOT / "docs/tutorial.md").read_text()


def blocks(text: str, language: str) -> list[str]:
    """The code of a page."""
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.fixture
def workspace(speaking, home, tmp_path, monkeypatch):
    """A directory as the reader has it; the document is shorter, as the tiny model's context is."""
    (tmp_path / "work/models").mkdir(parents=True)
    shutil.copytree(speaking, tmp_path / "work/models/smollm2-135M")
    (tmp_path / "work/contract.txt").write_text((ROOT / "LICENSE").read_text()[:2000])
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def test_the_tutorial(workspace, capsys):
    """Its files are written, its commands run in order, and each first word of the lines that it
    shows of the output is there.
    """
    (workspace / "ollm.toml").write_text(*blocks(TUTORIAL, "toml"))
    (workspace / "questions.json").write_text(*blocks(TUTORIAL, "json"))
    told = [block.replace("\\\n", " ") for block in blocks(TUTORIAL, "console")]
    assert len(told) == 5
    for block in told:
        command, *shown = block.removeprefix("$ ollm ").splitlines()
        with pytest.raises(SystemExit) as ended:
            main(shlex.split(command.replace("--context 3k", "--context 1k")))
        printed = "".join(capsys.readouterr())
        assert ended.value.code == 0, printed
        for line in shown:
            label = re.match(r"## .*|[a-z]+(?: memory| read| cache| context)?:?(?= )", line)
            assert label is None or label[0] in printed, (line, printed)
    assert "prefix cache  0 prompt" not in printed  # by decide, the last one: it was read before


@pytest.mark.parametrize("page", ["tutorial", "clients"])
def test_python_of_the_pages(workspace, page, capsys):
    """Runs as it is, from above the models directory."""
    (code,) = blocks((ROOT / f"docs/{page}.md").read_text(), "python")
    exec(code, {})
    assert capsys.readouterr().out
