"""Real processes that read one long prompt, killed at any moment: nothing is lost but the layer in
progress, and nothing is left behind.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ollm_core.kv.disk.inventory import take_inventory

ENVIRONMENT = {
    **os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
}  # fmt: skip
INTERRUPTED = """
import functools, os, signal, sys, time
import ollm_core.api, ollm_core.engine.engine as engine
from ollm_core.cli.main import main
from ollm_core.cli.streaming import ProgressBar

engine.CheckpointPolicy = functools.partial(engine.CheckpointPolicy, 300, 0, 1e9)
shown, sent = ProgressBar.__call__, []

def show(self, progress):
    shown(self, progress)
    if progress.saved_layers == 3 and not progress.resumed_layers and not sent:
        sent.append(1)
        print("sent", time.monotonic(), file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGINT)

ProgressBar.__call__ = show
main(sys.argv[1:])
"""


@pytest.fixture
def deep(chat, make_llama):
    """A tiny Llama of eight layers with a tokenizer of numbers."""
    names = {"bos_token_id": None, "eos_token_id": None}
    directory = make_llama(name="deep", num_hidden_layers=8, **names)
    for path in chat.glob("*token*"):
        shutil.copy(path, directory)
    return directory


def write_document(path, num_tokens):
    """A file of so many tokens."""
    numbers = torch.randint(3, 199, (num_tokens,), generator=torch.Generator().manual_seed(0))
    path.write_text(" ".join(map(str, numbers.tolist())))
    return path


@pytest.fixture
def document(tmp_path):
    """A file of three thousand tokens."""
    return write_document(tmp_path / "document.txt", 3000)


def killed(model, document, directory, num_kills, seed):
    """Series of runs under `num_kills` kills, each held against one that was not killed."""
    directory.mkdir()
    program = Path(__file__).parents[1] / "prefill_kills.py"
    command = [sys.executable, program, model, document, directory, str(num_kills), str(seed)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=3000, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["kills"] == num_kills
    for verb, answers in told["answers"].items():
        assert all(one == told["expected"][verb] for one in answers)
    assert sum(map(len, told["answers"].values())) > 0
    assert told["left"] == []
    return told


def test_killed_at_any_moment_it_goes_on(deep, document, tmp_path):
    """kill -9: right tokens, from the layer that was recorded, nothing left behind."""
    told = killed(deep, document, tmp_path / "runs", 10, 1)
    assert told["saved"] > 0
    assert told["went_on"] > 0


@pytest.mark.soak
def test_killed_at_many_moments_it_goes_on(deep, document, tmp_path):
    """Hundreds."""
    told = killed(deep, document, tmp_path / "runs", 400, 2)
    assert told["saved"] > 100
    assert told["went_on"] > 100


@pytest.mark.parametrize("verb", ["run", "ask"])
def test_ctrl_c_says_how_to_go_on(deep, tmp_path, verb):
    """Within two seconds, on one line after the word; the next run does so, and says it."""
    document = write_document(tmp_path / "document.txt", 600)
    question = ["--prompt", "7 8"] if verb == "run" else ["-q", "7 8"]
    arguments = [
        verb, deep, "--file", document, *question, "--device", "cpu", "--kv", "disk",
        "--kv-dir", tmp_path / "kv", "--chunk-size", "64", "--max-new-tokens", "2",
    ]  # fmt: skip
    command = [sys.executable, "-c", INTERRUPTED, *map(str, arguments)]
    quiet, pipe = subprocess.DEVNULL, subprocess.PIPE
    err = ""
    with subprocess.Popen(command, stdout=quiet, stderr=pipe, text=True, env=ENVIRONMENT) as run:
        assert run.stderr
        for line in run.stderr:
            if line.startswith("error: interrupted"):  # the interpreter takes a second to end
                ended = time.monotonic()
            err += line
    assert run.returncode == 130, err
    told = re.search(
        r"^error: interrupted\nhint: the same command goes on from layer (\d) of 8$", err, re.M
    )
    sent = re.search(r"^sent (\S+)$", err, re.M)
    assert told, err
    assert sent, err
    assert ended - float(sent[1]) < 2
    assert told[1] == "4"
    [left] = take_inventory(tmp_path / "kv").unfinished
    assert left.one.num_done + 1 == int(told[1])
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=100, env=ENVIRONMENT
    )
    assert f"going on from layer {told[1]} of 8" in done.stderr.splitlines()
    assert take_inventory(tmp_path / "kv").unfinished == []


def test_ctrl_c_says_nothing_where_there_is_nothing(deep, document, tmp_path):
    """Before anything is written, as in the first ten seconds."""
    arguments = ["run", deep, "--file", document, "--device", "cpu", "--chunk-size", "16"]
    arguments += ["--kv", "disk", "--kv-dir", tmp_path / "kv"]
    script = "from ollm import main; import sys; sys.argv[0] = 'ollm'; main()"
    command = [sys.executable, "-c", script, *map(str, arguments)]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=ENVIRONMENT)
    until = time.monotonic() + 100
    while not any((tmp_path / "kv").glob("*/layer-00000.kv")):
        assert time.monotonic() < until
        time.sleep(0.01)
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 130, err
    assert err.splitlines()[-1] == "error: interrupted"
