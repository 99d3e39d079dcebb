"""`ollm serve`: listens, answers, and ends well on a signal; refuses before a model is opened."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from ollm_core.cli.main import main


def start(*arguments: object) -> subprocess.Popen[str]:
    """`ollm serve`, in a process of its own."""
    command = [sys.executable, "-c", "from ollm import main; main()", "serve", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.mark.parametrize(("number", "more"), [(signal.SIGINT, ()), (signal.SIGTERM, ("--debug",))])
def test_a_server_answers_until_a_signal(tiny_chat: Path, number: int, more: tuple[str, ...]):
    """Its address is told; what it took is told at the end, and the code is 0. With --debug each
    request has a line, without what was asked.
    """
    with start(tiny_chat, "--device", "cpu", "--port", "0", *more) as process:
        try:
            err = answered_until(process, number)
        finally:
            process.kill()
    assert process.returncode == 0, err
    assert "weights read" in err
    assert "error" not in err
    assert ("/v1/completions: " in err) == bool(more)
    assert "swordfish" not in err


def answered_until(process: subprocess.Popen[str], number: int) -> str:
    """Send a signal in the middle of an answer; -> what is told of the end."""
    assert process.stderr
    while (line := process.stderr.readline()) and "Ctrl-C ends" not in line:
        pass
    match = re.match(r"tiny at (http://127\.0\.0\.1:\d+)/v1 and \1/api, Ctrl-C ends$", line)
    assert match, line + process.stderr.read()
    body = {"prompt": "swordfish", "max_tokens": 200, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{match[1]}/v1/completions", json=body) as answer:
        assert float(answer.headers["ollm-forecast-seconds"]) >= 0
        parts = answer.iter_raw()
        assert next(parts).startswith(b": ")
        process.send_signal(number)
        rest = b"".join(parts)
    assert b"[DONE]" in rest or b"the server is being stopped" in rest
    return process.communicate(timeout=60)[1]


def test_threads_wait_asleep_beside_others():
    """Chosen before anything loads torch, which reads it once."""
    code = (
        "import sys, ollm_core.cli.serve as verb; from ollm_core.cli.main import main\n"
        "verb.wait_asleep_beside_others = lambda: sys.exit(7 + ('torch' in sys.modules))\n"
        "main(['serve', 'no-such-model', '--device', 'cpu'])"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 7


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What is told of a command line that cannot be."""
    with pytest.raises(SystemExit) as ended:
        main(["serve", *map(str, arguments)])
    assert ended.value.code
    return capsys.readouterr().err


def test_without_the_extra_it_says_what_to_install(capsys, monkeypatch, tiny_chat):
    """In one line and a hint."""
    monkeypatch.setitem(sys.modules, "starlette", None)
    err = refused(capsys, tiny_chat)
    assert err.startswith("error: ollm serve: need the package starlette")
    assert "pip install 'ollm-core[serve]'" in err


def test_refusals_come_before_the_model(capsys, monkeypatch):
    """Of others' addresses without a key, and of a key that is too short, which is not repeated."""
    monkeypatch.delenv("OLLM_API_KEY", raising=False)
    assert "need an API key" in refused(capsys, "no-such-model", "--host", "0.0.0.0")
    monkeypatch.setenv("OLLM_API_KEY", "short")
    err = refused(capsys, "no-such-model")
    assert "api_key: need at least 8" in err
    assert "short" not in err
    monkeypatch.setenv("OLLM_API_KEY", "a-long-key")
    err = refused(capsys, "no-such-model", "--host", "0.0.0.0", "--port", "0")
    assert "no-such-model" in err
