"""Pulling from a hub: the hub's real client, and the command line, against a server on this
machine that speaks its API.
"""

from __future__ import annotations

import fcntl
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from hub_server import HubServer, Repo
from safetensors.torch import save

SMALL = {"config.json": b'{"model_type": "llama"}', "tokenizer.json": b"{}"}
WEIGHTS = save({"weight": torch.zeros(4)})
MODEL = {**SMALL, "model.safetensors": WEIGHTS}
SHARDS = {f"model-0000{i}-of-00002.safetensors": save({f"w{i}": torch.zeros(i)}) for i in (1, 2)}
INDEX = json.dumps({"weight_map": {f"w{i}": name for i, name in enumerate(SHARDS, 1)}}).encode()
JUNK = {
    "README.md": b"", "LICENSE": b"", "pytorch_model.bin": b"pickle", "model.pt": b"pickle",
    "model.gguf": b"", "consolidated.safetensors": b"", "original/consolidated.00.pth": b"pickle",
    "onnx/model.onnx": b"", "modeling_evil.py": b"code", "tokenization_evil.py": b"code",
    "../../../evil": b"code", "/evil": b"code", "evil*": b"", "custom_generate/x.py": b"code",
}  # fmt: skip


@pytest.fixture
def hub():
    with HubServer({}) as server:
        yield server


RUN_ALL = """
import contextlib, io, json, sys
from ollm_core.cli.main import main
results = []
for arguments in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main(arguments)
    except SystemExit as end:
        results.append((end.code or 0, out.getvalue(), err.getvalue()))
print(json.dumps(results))
"""
Result = tuple[int, str, str]
"""Exit code, stdout, stderr."""


@pytest.fixture
def environment(hub, tmp_path):
    """Of a process that knows no hub but the server."""
    named = ("HF_", "HUGGINGFACE_", "TRANSFORMERS_OFFLINE", "XDG_CACHE_HOME")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(named)}
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": f"{tmp_path}/hf"}
    return kept | settings | {"OLLM_MODELS": f"{tmp_path}/models"}


@pytest.fixture
def run(environment, tmp_path):
    """Runs command lines, one after another in one process."""

    def run_all(*lines: str, **more: str) -> list[Result]:
        command = [sys.executable, "-c", RUN_ALL, json.dumps([line.split() for line in lines])]
        done = subprocess.run(
            command, env=environment | more, stdout=subprocess.PIPE, check=True, cwd=tmp_path
        )
        results = [tuple(result) for result in json.loads(done.stdout)]
        assert not any("Traceback" in err for _, _, err in results)
        return results

    return run_all


@pytest.fixture
def ollm(run):
    """Runs one command line."""

    def run_one(line: str, **more: str) -> Result:
        (result,) = run(line, **more)
        return result

    return run_one


def files_below(directory: Path) -> set[str]:
    """Names of files, those of the hub's client itself left out."""
    found = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}
    return {name for name in found if not name.startswith(".cache/")}


def test_fetches_what_a_run_needs_and_nothing_else(hub, run, tmp_path):
    """Config, tokenizer and weights: no code, no pickle, no second form of the weights, and nothing
    outside its directory, whatever the names of the files. A second pull fetches nothing.
    """
    more = {"generation_config.json": b"{}", "chat_template.jinja": b"x", "tokenizer.model": b"x"}
    wanted = {**SMALL, **more, **SHARDS, "model.safetensors.index.json": INDEX}
    hub.repos["someone/sharded"] = Repo(wanted | JUNK)
    first, again = run("pull someone/sharded", "pull someone/sharded --json")
    target = tmp_path / "models/someone/sharded"
    assert first == (0, f"{target}\n", "")
    assert json.loads(again[1]) == {"id": "someone/sharded", "path": str(target)}
    assert files_below(target) == set(wanted)
    assert sorted(hub.fetched()) == sorted(wanted)
    assert [path.name for path in (tmp_path / "models/someone").iterdir()] == ["sharded"]


def test_goes_on_after_a_cut_connection(hub, ollm, tmp_path):
    """A file is taken up at the byte at which the line went dead."""
    big = save({"weight": torch.arange(6_000_000, dtype=torch.float32)})
    cut = Counter({"model.safetensors": 1})
    hub.repos["someone/cut"] = Repo({**SMALL, "model.safetensors": big}, cut=cut)
    code, _, err = ollm("pull someone/cut")
    assert (code, err) == (0, "")
    assert (tmp_path / "models/someone/cut/model.safetensors").read_bytes() == big
    ranges = [range_ for kind, path, range_ in hub.seen if kind == "GET" and "safetensors" in path]
    assert ranges[0] == ""
    assert ranges[1].startswith("bytes=1")


def test_a_pull_that_failed_keeps_whole_files(hub, ollm, tmp_path):
    """The next pull does not fetch them again; until then nothing has the model's name."""
    lost = list(SHARDS)[1]
    files = {**SMALL, **SHARDS, "model.safetensors.index.json": INDEX}
    hub.repos["someone/model"] = Repo(files, broken={lost})
    code, _, err = ollm("pull someone/model")
    assert code == 1
    assert "error: the hub answered 404 for someone/model\nhint: later, pulling again keeps" in err
    assert not (tmp_path / "models/someone/model").exists()
    left = tmp_path / "models/someone/.model.partial/.cache/huggingface/download/x.incomplete"
    left.write_bytes(b"of a killed pull")
    hub.repos["someone/model"].broken.clear()
    hub.seen.clear()
    assert ollm("pull someone/model")[0] == 0
    assert hub.fetched() == [lost]
    assert not any((tmp_path / "models/someone").rglob("*.incomplete"))


@pytest.mark.parametrize("token", ["", "hf_of_somebody"])
def test_gated(hub, ollm, token, tmp_path):
    """One line says what to do: with and without a token. Nothing stays."""
    hub.repos["someone/gated"] = Repo(MODEL, gated=True)
    code, _, err = ollm("pull someone/gated", HF_TOKEN=token)
    assert (code, err.count("\n")) == (1, 2)
    if token:
        assert "error: your token may not read someone/gated, which is gated\n" in err
    else:
        assert "error: someone/gated is gated: you must accept its licence first\n" in err
        assert "`hf auth login` (or set HF_TOKEN)" in err
    assert f" {hub.url}/someone/gated" in err
    assert not list((tmp_path / "models").iterdir())


def test_refusals_of_the_hub(hub, run):
    """A repository that is not there, a hub that is asked too often, and plain nonsense."""
    hub.repos["someone/busy"] = Repo(MODEL, busy=1)
    missing, busy, path, known = run(
        "pull someone/missing", "pull someone/busy", "pull ../../evil", "pull smollm2-135N"
    )
    assert missing[0] == busy[0] == 1
    assert "the hub has no someone/missing that everybody may read\nhint: check" in missing[2]
    assert "the hub refuses someone/busy for now: too many requests\nhint: wait some" in busy[2]
    assert path[:2] == (4, "")
    assert "hint: did you mean smollm2-135M" in known[2]


def test_out_of_reach(hub, ollm):
    """HF_HUB_OFFLINE is kept, and a hub that does not answer is named."""
    code, _, err = ollm("pull someone/model", HF_HUB_OFFLINE="1")
    assert code == 1
    assert "error: someone/model is not here, and HF_HUB_OFFLINE forbids to ask the hub\n" in err
    assert not hub.seen
    code, _, err = ollm("pull someone/model", HF_ENDPOINT="http://127.0.0.1:1")
    assert code == 1
    assert "error: cannot fetch someone/model from http://127.0.0.1:1: " in err


def test_lying_sizes(hub, run, tmp_path):
    """A file of another size than the list states is not taken, nor kept for the next time. One
    that the disk cannot hold is refused before a byte of it is fetched.
    """
    hub.repos["someone/liar"] = Repo(MODEL, stated={"model.safetensors": 5})
    hub.repos["someone/big"] = Repo(MODEL, stated={"model.safetensors": 10**15})
    liar, big = run("pull someone/liar", "pull someone/big")
    assert liar[0] == 1
    assert f"'model.safetensors' should have 5 bytes, got {len(WEIGHTS)} bytes" in liar[2]
    assert big[0] == 3
    assert "error: someone/big needs 1000 TB of disk, " in big[2]
    assert hub.fetched().count("model.safetensors") == 1
    assert not list((tmp_path / "models").iterdir())


def test_disk_full(hub, environment, tmp_path):
    """A disk that fills while a file is fetched ends it with exit code 3."""
    hub.repos["someone/full"] = Repo({**SMALL, "model.safetensors": bytes(3 << 20)})
    hub.repos["someone/full"].stated["model.safetensors"] = 0  # so that nobody sees it coming
    (tmp_path / "models").mkdir()
    mount = f"mount -t tmpfs -o size=1m tmpfs {tmp_path}/models"
    inside = ["unshare", "-rm", "sh", "-c", f'{mount} && exec "$0" "$@"']
    if subprocess.run([*inside, "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs a mount namespace")
    command = [*inside, sys.executable, "-m", "ollm_core.cli", "pull", "someone/full"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stderr.startswith("error: the disk is full\nhint: make room; ")
    assert done.returncode == 3


def test_what_cannot_be_opened_is_not_fetched(hub, run, tmp_path):
    """It is refused by its list of files, or by its config alone, and leaves nothing."""
    quantised = b'{"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}'
    cases = [
        ({"x.Q4_K_M.gguf": b""}, "--local-dir . && ollm import x.Q4_K_M.gguf"),
        ({**SMALL, "pytorch_model.bin": b""}, "'pytorch_model.bin' holds pickled weights"),
        ({"adapter_config.json": b"", "adapter_model.safetensors": b""}, "LoRA adapter"),
        ({**MODEL, "adapter_config.json": b""}, "pull its base model"),
        ({"README.md": b""}, "has no config.json\n"),
        ({**MODEL, "config.json": b"{"}, "not JSON"),
        ({**SMALL, "model.safetensors.index.json": INDEX}, "and does not have it"),
        ({**MODEL, "config.json": quantised}, "quant_method 'gptq' is not supported by adapter ll"),
    ]
    hub.repos.update({f"someone/case{i}": Repo(files) for i, (files, _) in enumerate(cases)})
    results = run(*(f"pull {name}" for name in hub.repos))
    for (_, told), (code, out, err) in zip(cases, results, strict=True):
        assert (code, out, err.count("\n")) == (2, "", 2)
        assert told in err
    assert not {name for name in hub.fetched() if name.endswith((".safetensors", ".bin", ".gguf"))}
    assert not list((tmp_path / "models").iterdir())


def test_force_and_what_is_not_ours(hub, run, tmp_path):
    """--force fetches again, and the user's other files stay; a directory of that name which holds
    something else is left alone without it, and one that another pull writes to in any case.
    """
    hub.repos["someone/model"] = hub.repos["someone/held"] = Repo(MODEL)
    target, held = tmp_path / "models/someone/model", tmp_path / "models/someone/.held.partial"
    for directory in (target, held):
        directory.mkdir(parents=True)
    (target / "notes").write_text("mine")
    with (held / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused, first, second, other = run(
            "pull someone/model",
            "pull someone/model --force",
            "pull someone/model --force",
            "pull someone/held",
        )
    assert refused[0] == 2
    assert "exists and holds no whole model\nhint: --force fetches it" in refused[2]
    assert (first[0], second[0]) == (0, 0)
    assert hub.fetched().count("model.safetensors") == 2
    assert (target / "notes").read_text() == "mine"
    assert other[0] == 2
    assert "another pull writes to" in other[2]


def test_the_hubs_own_cache_is_used(hub, environment, run):
    """What another program has fetched is neither fetched again nor copied."""
    hub.repos["someone/model"] = Repo(MODEL)
    code = "import huggingface_hub; print(huggingface_hub.snapshot_download('someone/model'))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    hub.seen.clear()
    pulled, listed = run("pull someone/model", "list-models --json")
    assert pulled == (0, done.stdout, "")
    assert not hub.seen
    models = json.loads(listed[1])["models"]
    places = {model["id"]: [one["place"] for one in model["places"]] for model in models}
    assert places["someone/model"] == ["hub cache"]


def test_fetch_config(hub, environment, tmp_path):
    """For a plan config.json is fetched and nothing else; without a hub the cached one serves."""
    hub.repos["someone/model"] = Repo(MODEL)
    code = (
        "from ollm_core.checkpoint.hub import fetch_config\n"
        "print(*fetch_config('someone/model'), sep='|')"
    )
    command = [sys.executable, "-c", code]
    told = []
    for more in ({}, {"HF_HUB_OFFLINE": "1"}):
        done = subprocess.run(
            command, env=environment | more, capture_output=True, text=True, check=True
        )
        told.append(done.stdout)
    assert told == [
        "{'model_type': 'llama'}|config.json of someone/model, fetched from the hub\n",
        "{'model_type': 'llama'}|config.json of someone/model in the hub's cache\n",
    ]
    assert hub.fetched() == ["config.json"]


def test_a_terminal_sees_one_bar(hub, environment, tmp_path):
    """It counts up to the size of the weights, within 80 columns, and is gone at the end."""
    big = save({"weight": torch.zeros(6_000_000)})
    hub.repos["someone/big"] = Repo({**SMALL, "model.safetensors": big})
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    command = [sys.executable, "-m", "ollm_core.cli", "pull", "someone/big"]
    done = subprocess.run(
        command, env=environment, stderr=slave, stdout=subprocess.PIPE, check=True
    )
    os.close(slave)
    shown = os.read(master, 1 << 16).decode()
    os.close(master)
    assert done.stdout == f"{tmp_path}/models/someone/big\n".encode()
    states = [state for state in shown.split("\r") if state.strip()]
    assert states
    assert all(state.startswith("big ") and "/24.0M" in state for state in states)
    assert max(map(len, states)) <= 80
    assert "\n" not in shown
    assert not shown.split("\r")[-2].strip()


def test_ctrl_c_ends_a_slow_download(hub, environment):
    """At once, and not when the file is there."""
    hub.repos["someone/slow"] = Repo({**SMALL, "model.safetensors": bytes(4 << 20)}, slow=0.2)
    command = [sys.executable, "-m", "ollm_core.cli", "pull", "someone/slow"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        while "model.safetensors" not in hub.fetched():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        start = time.monotonic()
        _, err = process.communicate(timeout=30)
        assert time.monotonic() - start < 5
    assert (process.returncode, err) == (130, "error: interrupted\n")
