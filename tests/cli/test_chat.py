"""`ollm chat`: turns, commands, and what Ctrl-C stops."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest
from one_line import is_one_line_error

from ollm_core.llm import LLM
from ollm_core.serving.request import SamplingParams

CPU = ("--device", "cpu", "--dtype", "float32", "--max-new-tokens", 6)


@pytest.fixture
def talk(ollm, tiny_chat, monkeypatch):
    """Runs `ollm chat` on lines of a pipe: (exit code, stdout, stderr)."""

    def run(*lines, options=()):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return ollm("chat", tiny_chat, *CPU, *options)

    return run


def test_each_turn_is_the_answer_to_all_before(talk, tiny_chat, tmp_path):
    """As a conversation that is given whole; documents stand before the message they are for."""
    document = tmp_path / "doc.txt"
    document.write_text("Some words.\n")
    code, out, err = talk(
        "hi", f"/file {document}", '"""', "what is it?", "say", '"""',
        f"/save {tmp_path / 'a.json'}",
        options=("--system", "be brief"),
    )  # fmt: skip
    assert code == 0
    assert "doc.txt: 11 characters, for your next message" in err
    messages = json.loads((tmp_path / "a.json").read_text())["messages"]
    assert [one["role"] for one in messages] == ["system", *["user", "assistant"] * 2]
    assert messages[3]["content"] == "# doc.txt\n\nSome words.\n\nwhat is it?\nsay"
    with LLM(tiny_chat, device="cpu", dtype="float32") as llm:
        for place in (2, 4):
            greedy = SamplingParams(temperature=0, max_tokens=6)
            [output] = llm.chat(messages[:place], greedy)
            assert output.outputs[0].text == messages[place]["content"]
    assert out == f"{messages[2]['content']}\n{messages[4]['content']}\n"


def test_commands(talk, tmp_path):
    """What cannot be done is one line, and the chat goes on; nothing is overwritten."""
    there = tmp_path / "there.md"
    there.write_text("mine")
    code, out, err = talk(
        "/nope", "/file", f"/file {tmp_path / 'gone'}", "/save", f"/save {there}",
        "/help", "/system be brief", "hi", f"/save {tmp_path / 'b.md'}", "/clear", "/system",
        f"/save {tmp_path / 'c.json'}", "/bye", "never read",
    )  # fmt: skip
    assert code == 0
    for words in (
        "there is no command /nope", "/file: need a path", "gone", "/save: need a path",
        f"{there} is there already", "Ctrl-C stops an answer", "the conversation begins anew",
    ):  # fmt: skip
        assert words in err
    assert there.read_text() == "mine"
    saved = (tmp_path / "b.md").read_text()
    assert saved.startswith("## system\n\nbe brief\n\n## user\n\nhi\n\n## assistant\n\n")
    assert json.loads((tmp_path / "c.json").read_text()) == {"messages": []}
    assert out.count("\n") == 1


def test_what_cannot_be_answered_is_taken_back(talk, tmp_path):
    """A message past the model's positions: one line; the next one is answered."""
    code, out, err = talk("word " * 900, "hi", f"/save {tmp_path / 'a.json'}")
    assert code == 0
    assert is_one_line_error(err.removesuffix(f"saved in {tmp_path / 'a.json'}\n"))
    assert "positions" in err
    messages = json.loads((tmp_path / "a.json").read_text())["messages"]
    assert [one["content"] for one in messages[::2]] == ["hi"]
    assert out.count("\n") == 1


@pytest.mark.slow
def test_ctrl_c_stops_an_answer_and_not_the_chat(smollm2, tmp_path):
    """In a terminal: the prompt comes back, and what was said stays."""
    saved = tmp_path / "a.json"
    command = [sys.executable, "-m", "ollm_core.cli", "chat", str(smollm2), "--device", "cpu"]
    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": "dumb"}
    with subprocess.Popen(
        [*command, "--max-new-tokens", "4000", "--temperature", "5", "--seed", "1"],
        stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True,
    ) as process:  # fmt: skip
        os.close(slave)
        try:
            _until(master, "> ")
            os.write(master, b"Tell me a very long story.\n")
            _until(master, "story.")
            assert len(_until(master, " ", least=200)) >= 200
            process.send_signal(signal.SIGINT)
            _until(master, "\n> ")
            os.write(master, f"/save {saved}\n/bye\n".encode())
            _until(master, "saved in")
            assert process.wait(60) == 0
        finally:
            process.kill()
    os.close(master)
    messages = json.loads(saved.read_text())["messages"]
    assert [one["role"] for one in messages] == ["user", "assistant"]
    assert 100 < len(messages[1]["content"]) < 15_000


def _until(master, words, least=0, seconds=120.0):
    """What the terminal shows until `words`, and at least so many characters."""
    found, end = "", time.monotonic() + seconds
    while not (words in found and len(found) >= least):
        assert time.monotonic() < end, f"no {words!r} in {found[-500:]!r}"
        if select.select([master], [], [], 1)[0]:
            found += os.read(master, 4096).decode(errors="replace").replace("\r\n", "\n")
    return found
