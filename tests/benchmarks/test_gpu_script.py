"""benchmarks/gpu/gpu.py without a card: its parts on tiny models, and when they go wrong."""

from __future__ import annotations

import importlib
import json
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import ollm
from benchmarks.gpu.gpu import parsed
from benchmarks.gpu.parts import choices, experts, long, parity, resident, streamed, weights
from benchmarks.gpu.parts.checkpoints import LLAMA, cut, llama
from benchmarks.gpu.parts.listing import chosen, parts
from benchmarks.gpu.parts.parity import Case
from benchmarks.gpu.parts.peaks import over_budget
from benchmarks.gpu.parts.record import Record
from benchmarks.gpu.parts.running import Ending, run_part
from benchmarks.gpu.parts.work import OutOfTime, Work
from benchmarks.tools.children import script


@pytest.fixture
def work(tmp_path):
    """A part's work, with time enough."""
    return Work("cpu", True, tmp_path, time.time() + 300)


class Told(dict):
    """Takes findings, by name."""

    def __call__(self, name, told, *, fault="", **fields):
        json.dumps(fields)  # all of it can be recorded
        assert told
        self[name] = {"fault": fault, **fields}

    @property
    def faults(self):
        return {name: one["fault"] for name, one in self.items() if one["fault"]}


def child(code, seconds=20.0, stop=None):
    """Runs Python code as a part; returns what it said and how it ended."""
    found = []
    ending = run_part([sys.executable, "-S", "-c", code], seconds, found.append, stop=stop)
    return found, ending


def test_findings_come_as_they_are_printed():
    """What is no finding is passed over."""
    found, ending = child(
        'print(\'hello\'); print(\'{"finding": "a", "told": "b"}\'); print(\'{\')'
    )
    assert found == [{"finding": "a", "told": "b"}]
    assert (ending.state, ending.error) == ("done", "")


@pytest.mark.parametrize(
    ("code", "state", "error"),
    [
        ("raise ValueError('no')", "failed", "exit code 1, ValueError: no"),
        ("import os; os.kill(os.getpid(), 11)", "failed", "signal SIGSEGV"),
        ('print(\'{"error": "why", "traceback": "where"}\'); exit(1)', "failed", "why"),
        ('print(\'{"error": "half", "out_of_time": true}\')', "cut short", "half"),
    ],
)
def test_how_a_part_ends_is_told(code, state, error):
    """By itself, by a signal, or for lack of time."""
    _, ending = child(code)
    assert (ending.state, ending.error) == (state, error)


def test_a_part_that_takes_too_long_is_killed(monkeypatch):
    """With all that it has started; what it had found stays."""
    monkeypatch.setattr("benchmarks.gpu.parts.running.GRACE_SECONDS", 0.3)
    code = (
        "import subprocess, sys, time\n"
        "started = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(60)'])\n"
        'print(\'{"finding": "%d"}\' % started.pid, flush=True)\n'
        "time.sleep(60)"
    )
    found, ending = child(code, seconds=2)
    assert ending.state == "cut short"
    pid, until = int(found[0]["finding"]), time.monotonic() + 30
    while _is_alive(pid) and time.monotonic() < until:  # a signal takes its time
        time.sleep(0.02)
    assert not _is_alive(pid)


def test_a_part_is_killed_with_the_script():
    """When the script itself is ended."""
    stop = threading.Event()
    threading.Timer(0.3, stop.set).start()
    _, ending = child("import time; time.sleep(60)", stop=stop)
    assert (ending.state, ending.seconds < 30) == ("cut short", True)


def _is_alive(pid):
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_the_record_is_written_after_every_finding(tmp_path):
    """A kill at any moment leaves what was done; a fault and a failure make the whole fail."""
    record = Record(tmp_path / "new" / "record.json", {"date": "today"})

    def written():
        return json.loads(record.path.read_text())

    record.begin("one", 9.0)
    assert written()["parts"]["one"]["state"] == "running"
    record.take("one", {"finding": "f", "told": "t", "number": 3})
    assert written()["parts"]["one"]["findings"] == {"f": {"told": "t", "number": 3}}
    record.end("one", Ending("done", 2.0))
    record.leave_out("two")
    assert (record.failed, record.left_out) == (False, ["two"])
    record.begin("three", 9.0)
    record.end("three", Ending("failed", 1.0, "why", "where"))
    assert record.failed
    assert written()["unfinished"] == ["two: no time left", "three: failed, why"]
    other = Record(tmp_path / "other.json", {})
    other.begin("one", 9.0)
    other.take("one", {"finding": "f", "told": "t", "fault": "another token"})
    other.end("one", Ending("done", 2.0))
    assert (other.failed, other.faults) == (True, ["one, f: another token"])


def test_parts_can_be_chosen():
    """By their names, or all of a kind; each can be run."""
    there = parts()
    assert len({part.name for part in there}) == len(there)
    for part in there:
        assert callable(importlib.import_module(f"benchmarks.gpu.parts.{part.module}").run)
    assert {part.module for part in chosen(["parity", "long"], there)} == {"parity", "long"}
    assert [part.argument for part in chosen(["parity-llama"], there)] == ["llama"]
    with pytest.raises(ValueError, match="no part 'nix'"):
        chosen(["nix"], there)


def test_a_run_on_the_cpu_is_no_result(capsys):
    """It must say where its record goes."""
    with pytest.raises(SystemExit, match="2"):
        parsed(["--device", "cpu", "--small"])
    assert "--out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({}, ""),
        ({"device_requested_bytes": 104}, ""),
        ({"device_requested_bytes": 106}, "1 bytes over the device budget of 100 (requested)"),
        ({"device_accounted_bytes": 101}, "over the device budget of 100 (accounted)"),
        ({"host_accounted_bytes": 52}, "2 bytes over the host budget of 50 (accounted)"),
    ],
)
def test_a_byte_over_the_budget_is_a_fault(changes, fault):
    """What is on the device and not the library's apart."""
    found = {"device_accounted_bytes": 100, "device_requested_bytes": None}
    found |= {"device_limit_bytes": 100, "host_accounted_bytes": 50, "host_limit_bytes": 50}
    told = over_budget({**found, **changes}, beside_bytes=5)
    assert (fault in told) if fault else not told


def test_what_overlaps():
    """A token's time beside that of its slowest part; computing counts where it is known."""
    one = {"weight_bytes": 120, "weights_on_device_bytes": 20, "read_bytes_per_pass": 4 * 10**9}
    one["step_seconds"] = [9.0, 2.5, 2.5]
    kept = {"device_layers": 3, "num_layers": 3, "step_seconds": [0.5]}
    bus = {"pageable to device": 10.0, "pinned to device": 80.0, "pinned to host": 900.0}
    found = streamed.overlap(one, kept, 2.0, bus, 20)
    assert found["alone_seconds"] == {"read": 2.0, "copy": 1.0, "compute": 0.5}
    assert (found["slowest"], found["share_of_slowest"]) == ("read", 0.8)
    found = streamed.overlap(one, {**kept, "device_layers": 2}, 2.0, bus, 20)
    assert set(found["alone_seconds"]) == {"read", "copy"}


@pytest.fixture
def few_cases(monkeypatch):
    """Two ways to run a tiny model."""
    found = [Case("bfloat16", "device", least=False), Case("float32", "disk", least=True)]
    monkeypatch.setattr(parity, "cases", lambda _: iter(found))


def test_parity_is_seen(work, few_cases):
    """Every case of a family holds, in the memory that was planned."""
    told = Told()
    parity.run(work, told, "gpt-oss")
    assert (len(told), told.faults) == (2, {})
    assert all(one["same_bits"] for one in told.values())
    assert told["float32, KV on disk, least memory"]["first_difference"] is None


def test_another_token_is_a_fault(work, few_cases, monkeypatch):
    """It says where. What there is no time for is told too."""
    greedy = parity.Reference.greedy

    def other(*given):
        tokens, logits = greedy(*given)
        return [*tokens[:-1], tokens[-1] ^ 1], logits

    monkeypatch.setattr(parity.Reference, "greedy", other)
    told = Told()
    parity.run(work, told, "llama")
    faults = [fault.partition(";")[0] for fault in told.faults.values()]
    assert faults == ["token 3 of 4 differs", "token 3 of 4 differs"]
    with pytest.raises(OutOfTime, match="2 cases"):
        parity.run(replace(work, ends=time.time()), told, "llama")


def test_a_checkpoint_has_the_layers_that_there_is_time_for(work):
    """At least one, and what was written is opened; so are the first layers of another."""
    whole = llama(work)
    assert (whole.num_layers, whole.embedding_bytes > 0) == (3, True)
    ids = torch.arange(10, 40)[None]
    logits = []
    for checkpoint in (whole, cut(work, whole, LLAMA, 2), cut(work, whole, LLAMA, 9)):
        with ollm.load(checkpoint.path, device="cpu", device_memory="1GB") as model:
            logits.append(model(input_ids=ids).logits)
    assert torch.equal(logits[0], logits[2])
    assert not torch.equal(logits[0], logits[1])
    hurried = replace(work, directory=work.path("hurried"), ends=time.time() - 1)
    assert llama(hurried).num_layers == 1


def test_the_parts_that_measure(work):
    """Each runs on a tiny model, breaks no promise and records what it should."""
    told = Told()
    weights.run(work, told)
    streamed.run(work, told)
    resident.run(work, told)
    long.run(work, told)
    choices.run(work, told)
    assert told.faults == {}
    assert told["weights on disk"]["read_bytes_per_pass"] > 0
    assert told["overlap, disk"]["step_seconds"] > 0
    assert told["16 tokens of prompt"]["same_tokens"]
    assert told["260 tokens, 3 layers"]["kv_read_bytes_per_pass"] > 0
    assert {"attention exact", "attention blockwise", "reader mmap"} <= told.keys()
    for one in told.values():
        if "device_planned_bytes" in one:
            assert one["device_accounted_bytes"] <= one["device_limit_bytes"]


def test_the_part_of_experts(work):
    """All tiers give the tokens of transformers, and nothing stays on the disk."""
    told, family = Told(), "gpt-oss-20b"
    experts.run(work, told, family)
    assert told.faults == {}
    assert told["experts on disk"]["experts_routed"] > 0
    assert told["transformers"]["tokens"] == told["experts on disk"]["tokens"]
    assert not (work.directory / family).exists()


@pytest.mark.slow
def test_the_script(tmp_path):
    """As it is called, with a part of each kind; ended early, it leaves its record and no files."""
    out, scratch = tmp_path / "record.json", tmp_path / "scratch"
    scratch.mkdir()
    command = [*script("gpu"), "--device", "cpu", "--small", "--out", str(out)]
    command += ["--minutes", "3", "--directory", str(scratch)]
    asked = ["--part", "weights", "--part", "choices"]
    with subprocess.Popen([*command, *asked], stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if "choices" in line:  # the last one, and its first finding
                process.send_signal(signal.SIGTERM)
                break
        process.communicate(timeout=60)
    assert process.returncode == 1
    found = json.loads(out.read_text())
    assert found["parts"]["weights"]["state"] == "done"
    assert "attention exact" in found["parts"]["choices"]["findings"]
    assert (found["faults"], list(scratch.iterdir())) == ([], [])
