"""What a shell is offered, by click's own protocol."""

from __future__ import annotations

import os
import pty
import select
import shutil
import subprocess
import sys
import time

import pytest

from ollm_core.cli.main import cli


def offered(tmp_path, *words):
    """What bash gets for the last of the words."""
    environment = os.environ | {
        "_OLLM_COMPLETE": "bash_complete",
        "COMP_WORDS": " ".join(("ollm", *words)),
        "COMP_CWORD": str(len(words)),
        "OLLM_MODELS": str(tmp_path / "models"),
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "OLLM_LOAD_PLUGINS": "ollm-adapter-llama",
    }
    code = (
        "import sys; from ollm import main\n"
        "try: main()\n"
        "finally: assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stderr == ""
    return [tuple(line.split(",")) for line in done.stdout.split()]


def test_models(tmp_path, tiny):
    """Ids and other names of the catalogs, and models on disk; no torch is loaded."""
    (tmp_path / "models").mkdir()
    tiny.rename(tmp_path / "models/smolly")
    found = offered(tmp_path, "plan", "smol")
    assert {("plain", "smolly"), ("plain", "smollm2-135M"), ("plain", "smollm2:135m")} <= set(found)
    assert all(kind == "plain" and name.startswith("smol") for kind, name in found)
    assert offered(tmp_path, "plan", "./smol") == [("dir", "./smol")]


def test_values(tmp_path):
    """Those of an option, files, and verbs; a broken file is no error here."""
    (tmp_path / "ollm.toml").write_text("= =")
    assert offered(tmp_path, "run", "x", "--kv", "d") == [("plain", "device"), ("plain", "disk")]
    assert offered(tmp_path, "run", "x", "--precision", "e") == [("plain", "exact")]
    assert offered(tmp_path, "run", "x", "--file", "d") == [("file", "d")]
    assert ("plain", "doctor") in offered(tmp_path, "do")


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_in_a_real_shell(tmp_path, tiny):
    """bash, at a terminal of its own, writes the rest of a model's name."""
    (tmp_path / "models").mkdir()
    tiny.rename(tmp_path / "models/unmistakable")
    program = tmp_path / "ollm"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m ollm_core.cli "$@"\n')
    program.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "TERM": "dumb"}
    terminal, its_end = pty.openpty()
    shell = subprocess.Popen(
        ["bash", "--norc", "--noprofile", "-i"],
        cwd=tmp_path, env=environment, stdin=its_end, stdout=its_end, stderr=its_end,
        start_new_session=True,
    )  # fmt: skip
    os.close(its_end)
    try:
        os.write(terminal, b"source <(ollm completion bash); echo rea''dy\n")
        read_until(terminal, b"ready")
        os.write(terminal, b"ollm run models/unmis\t")
        read_until(terminal, b"models/unmistakable ")
    finally:
        shell.kill()
        shell.wait()
        os.close(terminal)


def read_until(terminal, wanted, seconds=60):
    """Raises AssertionError where it does not come."""
    told, end = b"", time.monotonic() + seconds
    while wanted not in told:
        assert time.monotonic() < end, told
        if select.select([terminal], [], [], 0.5)[0]:
            told += os.read(terminal, 4096)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_scripts(ollm, tmp_path, shell):
    """Are the shell's own: where it is installed, it reads them."""
    code, out, _ = ollm("completion", shell)
    assert (code, "_OLLM_COMPLETE" in out) == (0, True)
    if path := shutil.which(shell):
        (tmp_path / "script").write_text(out)
        subprocess.run([path, "-n", tmp_path / "script"], check=True)


def test_every_verb_with_a_model_completes_it():
    """By the same argument."""
    from ollm_core.cli.completion import complete_models

    models = [one for verb in cli.commands.values() for one in verb.params if one.name == "model"]
    assert len(models) == 9
    assert {one._custom_shell_complete for one in models} == {complete_models}
