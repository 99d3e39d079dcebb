"""Paths in options: what cannot be used is one line with exit code 2, before anything long."""

from __future__ import annotations

import io
import json
import os
import re
import sys
from pathlib import Path

import pytest

from ollm_core.cli.main import main


@pytest.fixture
def paths(tmp_path: Path, monkeypatch) -> Path:
    """A file, and nothing else, in the current directory and at home."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("OLLM_MODELS", raising=False)
    (tmp_path / "file").write_text("5 6")
    return tmp_path


def outcome(capsys, *arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command line in this process."""
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return int(end.value.code or 0), *capsys.readouterr()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["list-models", "--models-dir", "file"], "is not a directory"),
        (["list-models", "--models-dir", "~/file/x"], "Not a directory"),
        (["pull", "llama3-1B-chat", "--models-dir", "file"], "is not a directory"),
        (["run", "x" * 300, "--prompt", "5"], "x" * 300),
        (["run", "y/" + "x" * 300, "--prompt", "5"], "there is no directory"),
        (["plan", "y/" + "x" * 300], "there is no directory"),
        (["run", "x", "--file", "."], "Is a directory"),
        (["run", "x", "--file", "/dev/zero"], "more than the 100 MB"),
        (["run", "x", "--file", "n" * 300], "name too long"),
        (["run", ".", "--prompt", "5", "--kv-dir", "file"], "not a directory"),
        (["run", ".", "--prompt", "5", "--kv-dir", "~/file/kv"], "not a directory"),
        (["run", "x", "--prompt", "5", "--profile", "."], "Is a directory"),
        (["run", "x", "--prompt", "5", "--profile", "file/x"], "Not a directory"),
        (["cache", "list", "--kv-dir", "file"], "is not a directory"),
        (["cache", "list", "--kv-dir", "n" * 300], "is not a directory"),
        (["cache", "list", "--kv-dir", ""], "is not a path"),
    ],
)
def test_what_cannot_be_used_is_one_line(paths: Path, capsys, arguments: list[str], reason: str):
    """It names the path and the reason."""
    code, out, err = outcome(capsys, *arguments)
    assert (code, out) == (4 if arguments[1] == "x" * 300 else 2, "")
    assert reason in err
    assert err.startswith("error: ")
    assert len(err.splitlines()) <= 2
    assert [path.name for path in paths.iterdir()] == ["file"]


def test_models_named_by_the_environment(paths: Path, capsys, monkeypatch):
    """As by the option."""
    monkeypatch.setenv("OLLM_MODELS", "~/file")
    code, out, err = outcome(capsys, "list-models")
    assert (code, out) == (2, "")
    assert "OLLM_MODELS" in err


@pytest.mark.parametrize(
    ("out", "reason"),
    [
        ("file", "file exists|is not a directory"),
        ("file/x", "ot a directory"),
        ("/proc/x", "No such"),
    ],
)
def test_where_a_model_cannot_be_written(paths: Path, chat: Path, capsys, out: str, reason: str):
    """Noticed before weights are read."""
    (paths / "x.gguf").write_bytes(b"GGUF")
    for verb in (["convert", chat], ["import", "x.gguf"]):
        code, _, err = outcome(capsys, *verb, "--out", out)
        assert code == 2
        assert re.search(reason, err)
        assert len(err.splitlines()) <= 2


def test_a_terminal_and_a_home(paths: Path, chat: Path, capsys):
    """`~` is expanded wherever a path is named, also where no shell has done it."""
    run = ["run", chat, "--raw", "--file", "~/file", "--device", "cpu", "--max-new-tokens", "2"]
    code, _, err = outcome(capsys, *run, "--kv-dir", "~/kv ü", "--profile", "~/profile.json")
    assert code == 0, err
    assert (paths / "profile.json").is_file()
    assert outcome(capsys, "cache", "list", "--kv-dir", "~/kv ü")[1].count("\n") == 2
    assert not (paths / "~").exists()


def test_stdin_without_an_end(paths: Path, capsys, monkeypatch):
    """Is not read for ever."""
    with open("/dev/zero", "rb") as zero:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(zero))
        code, _, err = outcome(capsys, "run", "x")
    assert code == 2
    assert "more than the 100 MB" in err


def test_a_pipe_as_document(paths: Path, chat: Path, capsys):
    """As a shell's `<(...)`."""
    reading, writing = os.pipe()
    os.write(writing, b"5 6 7")
    os.close(writing)
    arguments = ["--raw", "--device", "cpu", "--max-new-tokens", "1", "--json"]
    code, out, err = outcome(capsys, "run", chat, "--file", f"/dev/fd/{reading}", *arguments)
    os.close(reading)
    assert code == 0, err
    assert '"num_prompt_tokens": 3' in out


def test_a_page_as_document(paths: Path, chat: Path, capsys):
    """Its text is read; with `--as-text` its tags are words too: `<`, `html`, `><` and so on."""
    (paths / "page.html").write_text("<html><p>5 6 7</p>")
    arguments = ["--raw", "--device", "cpu", "--max-new-tokens", "1", "--json"]
    for more, num_tokens in (([], 3), (["--as-text"], 11)):
        code, out, err = outcome(capsys, "run", chat, "--file", "page.html", *arguments, *more)
        assert code == 0, err
        assert json.loads(out)["num_prompt_tokens"] == num_tokens


def test_what_a_document_lacks_is_told(paths: Path, chat: Path, capsys):
    """On stderr, before the answer."""
    from reportlab.pdfgen.canvas import Canvas

    canvas = Canvas("scan.pdf")
    canvas.drawString(100, 700, "5 6 7")
    canvas.showPage()
    canvas.showPage()
    canvas.save()
    arguments = ["--raw", "--device", "cpu", "--max-new-tokens", "1", "--json"]
    code, out, err = outcome(capsys, "run", chat, "--file", "scan.pdf", *arguments)
    assert (code, json.loads(out)["num_prompt_tokens"]) == (0, 3)
    assert f"warning: {paths / 'scan.pdf'}: no text on 1 of its pages (2)" in err
