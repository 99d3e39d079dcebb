"""Rows on a Ray cluster: the same files, whoever answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import torch
from batch_rows import InstantModel, read_lines, row, texts, write_rows

import ollm
from ollm_core.errors import UnsupportedError
from ollm_core.serving.jobs.cluster import Cluster, RowWorker, _taken, _told
from ollm_core.serving.jobs.job import BatchJob
from ollm_core.serving.jobs.rows import Outcome, RowAnswerer, TakenRow
from ollm_core.serving.openai.requests import Defaults, read_row


@pytest.fixture
def paths(tmp_path):
    """Input and output."""
    return tmp_path / "in.jsonl", tmp_path / "out.jsonl"


def test_rows_that_come_back_in_any_order(paths):
    """Twice, or never asked for: each has one line, and what is missing is left."""
    write_rows(paths[0], [row(f"r{n}", (n, 5)) for n in range(9)] + [row("bad", temperature="hot")])
    answerer = RowAnswerer(InstantModel(), "tiny")

    def answer(rows, tell):
        found: list[Outcome] = []
        answerer.answer(rows, found.append)
        for outcome in [*reversed(found), *found, Outcome(999)]:
            if outcome.line != 4:
                tell(outcome)

    with BatchJob(*paths, settings={}) as job:
        told = job.run_by(answer, counts_tokens=True)
    assert (told.num_answered, told.num_failed, told.num_left) == (8, 1, 1)
    assert told.num_new_tokens > 0
    assert texts(paths[1]) == {f"r{n}": str(n + 5) for n in range(9) if n != 3}
    with BatchJob(*paths, settings={}) as job:
        assert job.run(InstantModel(), "tiny").num_found == 9
    assert texts(paths[1])["r3"] == "8"


def test_a_worker_answers_as_one_machine_does(speaking, paths):
    """Columns of Ray's batches in, JSON out: the bodies are those of `batch` on this machine."""
    rows = [row(f"r{n}", f"Number {n}", max_tokens=3, temperature=0) for n in range(3)]
    write_rows(paths[0], [*rows, row("bad", temperature="hot")])
    loading = {"device": "cpu", "dtype": torch.float32}
    taken = [
        TakenRow(n, read_row(line)) for n, line in enumerate(paths[0].read_bytes().splitlines(), 1)
    ]
    sent = np.array([json.dumps(_told(one)) for one in taken], dtype=object)
    assert [_taken(one) for one in sent] == taken
    worker = RowWorker(lambda: ollm.load(speaking, **loading), "tiny", Defaults(max_tokens=4))
    found = [json.loads(one) for one in worker({"row": sent})["outcome"]]
    with ollm.load(speaking, **loading) as model, BatchJob(*paths, settings={}) as job:
        job.run(model, "tiny", Defaults(max_tokens=4))
    alone = {one["custom_id"]: one["response"]["body"]["choices"] for one in read_lines(paths[1])}
    assert {f"r{one['line'] - 1}": one["body"]["choices"] for one in found if one["body"]} == alone
    [bad] = [one for one in found if not one["body"]]
    assert (bad["line"], bad["code"], bad["param"]) == (4, "invalid_request", "temperature")


def test_without_ray(monkeypatch):
    """One line, and how to get it."""
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UnsupportedError, match="Ray is not here") as refused:
        Cluster("local")
    assert "ollm-core[ray]" in (refused.value.hint or "")


def _workers():
    """Processes of Ray that answer rows, with the processor seconds they have taken."""
    found = {}
    for process in psutil.process_iter(["cmdline"]):
        if "MapWorker(MapBatches(RowWorker))" in " ".join(process.info["cmdline"] or []):
            with process.oneshot():
                found[process] = process.cpu_times().user
    return found


@pytest.mark.soak
def test_a_worker_and_the_command_are_killed(smollm2, paths):
    """Two workers, of which one is killed in the middle, then the command itself: after the next
    run every row has one line.
    """
    pytest.importorskip("ray")
    num_rows = 300
    write_rows(paths[0], [row(f"r{n}", f"Number {n} is", max_tokens=6) for n in range(num_rows)])
    command = [sys.executable, "-m", "ollm_core.cli", "batch", str(smollm2), *map(str, paths)]
    command += ["--ray", "local", "--ray-workers", "2", "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, env=environment) as process:
        was_killed = False
        while process.poll() is None and len(read_whole(paths[1])) < 200:
            time.sleep(0.2)
            if read_whole(paths[1]) and not was_killed:
                workers = _workers()
                max(workers, key=workers.get).kill()
                was_killed = True
        assert was_killed
        process.kill()
    before = read_whole(paths[1])
    assert 200 <= len(before) < num_rows
    time.sleep(5)  # Ray's own processes end after it
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert f"{num_rows - len(before)} answered" in done.stderr
    assert texts(paths[1]).keys() == {f"r{n}" for n in range(num_rows)}


def read_whole(path):
    """The lines that are whole."""
    return path.read_bytes().split(b"\n")[:-1] if path.exists() else []
