"""`ollm batch`: what it answers and tells, how it ends, and how it goes on."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from batch_rows import chat, read_lines, row, texts, write_rows
from one_line import is_one_line_error

from ollm_core.cli import batch
from ollm_core.cli.batch import RowsBar
from ollm_core.contracts.progress import Progress
from ollm_core.serving.jobs.job import BatchJob, BatchProgress
from ollm_core.serving.jobs.settings import SettingsFile

CPU = ("--device", "cpu", "--dtype", "float32")
STARTED = (
    "import sys; from ollm import main; print('started', flush=True); sys.argv[0] = 'ollm'; main()"
)
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def some_rows(num_rows: int, num_new: int = 8) -> list[dict]:
    """Greedy completions."""
    return [
        row(f"r{n}", f"Row {n} says", temperature=0, max_tokens=num_new) for n in range(num_rows)
    ]


def long_rows(num_rows: int) -> list[dict]:
    """Completions that end one after another."""
    return [
        row(f"r{n}", "a", temperature=0, max_tokens=6 * n + 6, ignore_eos=True)
        for n in range(num_rows)
    ]


def start(*arguments: object) -> subprocess.Popen[str]:
    """The command in a process of its own."""
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", STARTED, *map(str, arguments)]
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=ENVIRONMENT)


def processor_seconds(used: resource.struct_rusage) -> float:
    """Of processes that have ended."""
    return used.ru_utime + used.ru_stime


def wait_for_answer(path: Path, process: subprocess.Popen[str]) -> None:
    """Until there is one."""
    until = time.monotonic() + 120
    while not path.exists() or not path.stat().st_size:
        assert time.monotonic() < until
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def test_batch(ollm, tiny_chat, tmp_path):
    """Answers and errors in two files; a summary for people, or one object in JSON."""
    rows = [*some_rows(5), chat("c", "why?", temperature=0), "{oops"]
    paths = write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    code, out, err = ollm("batch", tiny_chat, *paths, *CPU, "--max-new-tokens", 3)
    assert (code, out) == (0, "")
    assert "6 answered, 1 failed" in err
    for words in ("tokens/s", "weights read", str(paths[1]), str(tmp_path / "out.errors.jsonl")):
        assert words in err
    first = texts(paths[1])
    assert first.keys() == {"c", *(f"r{n}" for n in range(5))}
    [error] = read_lines(tmp_path / "out.errors.jsonl")
    assert error["error"]["line"] == 7
    paths[1].unlink()
    code, out, err = ollm(
        "batch",
        tiny_chat,
        *paths,
        *CPU,
        "--max-new-tokens",
        3,
        "--errors",
        tmp_path / "e",
        "--json",
    )
    assert (code, err) == (0, "")
    told = json.loads(out)
    assert (told["num_rows"], told["num_answered"], told["num_failed"]) == (7, 6, 1)
    assert told["errors"] == str(tmp_path / "e")
    assert told["num_new_tokens"] > 0
    assert texts(paths[1]) == first
    code, out, _ = ollm("batch", tiny_chat, *paths, *CPU, "--json", "--errors", tmp_path / "e")
    assert (code, json.loads(out)["num_found"]) == (0, 7)


def test_what_cannot_be_used_is_one_line(ollm, tiny_chat, tmp_path):
    """Before torch opens the model; nothing is made or changed."""
    rows = write_rows(tmp_path / "in.jsonl", some_rows(2))
    other = tmp_path / "other.txt"
    other.write_text("mine")
    (tmp_path / "dir").mkdir()
    before = sorted(tmp_path.rglob("*"))
    for arguments, words in (
        ((tiny_chat, tmp_path / "no.jsonl", tmp_path / "out"), "cannot read"),
        ((tiny_chat, tmp_path / "dir", tmp_path / "out"), "is not a regular file"),
        ((tiny_chat, rows, tmp_path / "dir"), "cannot write to"),
        ((tiny_chat, rows, tmp_path / "no" / "out"), "cannot write to"),
        ((tiny_chat, rows, rows), "the output is the input"),
        ((tiny_chat, rows, tmp_path / "out", "--errors", rows), "the error file is the input"),
        ((tiny_chat, rows, other), "nothing says how"),
        ((tmp_path / "none", rows, tmp_path / "out"), "there is no directory"),
    ):
        code, out, err = ollm("batch", *arguments, *CPU)
        assert (code, out) == (2, ""), err
        assert is_one_line_error(err)
        assert words in err
    assert sorted(tmp_path.rglob("*")) == before
    assert other.read_text() == "mine"


@pytest.fixture
def broken_off(ollm, tiny_chat, tmp_path, monkeypatch):
    """Input and output as a killed run leaves them: a part of the answers, and the settings."""
    paths = write_rows(tmp_path / "in.jsonl", some_rows(4)), tmp_path / "out.jsonl"
    with monkeypatch.context() as patched:
        patched.setattr(SettingsFile, "remove", lambda _: None)
        assert ollm("batch", tiny_chat, *paths, *CPU)[0] == 0
    whole = texts(paths[1])
    paths[1].write_text(paths[1].read_text().split("\n")[0] + "\n")
    return paths, whole


@pytest.mark.parametrize(
    ("model", "rows", "options", "words"),
    [
        ("another", "in.jsonl", CPU, "model"),
        ("tiny", "more.jsonl", CPU, "input"),
        ("tiny", "in.jsonl", (*CPU, "--max-new-tokens", 9), "max_new_tokens 256, now 9"),
        ("tiny", "in.jsonl", CPU[:2], "dtype float32, now auto"),
        ("tiny", "in.jsonl", (*CPU, "--precision", "exact"), "precision fast, now exact"),
    ],
)
def test_other_settings_are_refused_until_told(
    ollm, tiny_chat, broken_off, model, rows, options, words
):
    """Whatever changes an answer: the model's files, the rows, an option."""
    (first, output), _ = broken_off
    models = {"tiny": tiny_chat, "another": shutil.copytree(tiny_chat, first.with_name("another"))}
    (models["another"] / "generation_config.json").write_text("{}")
    write_rows(first.with_name("more.jsonl"), some_rows(5))
    before = output.read_text()
    command = ("batch", models[model], first.with_name(rows), output, *options)
    code, _, err = ollm(*command)
    assert code == 2
    assert is_one_line_error(err)
    assert words in err
    assert "--anyway" in err
    assert output.read_text() == before
    assert ollm(*command, "--anyway")[0] == 0
    assert output.read_text().startswith(before)
    assert len(texts(output)) == (5 if rows == "more.jsonl" else 4)
    assert not output.with_name("out.jsonl.job").exists()


def test_options_that_change_no_answer_may_change(ollm, tiny_chat, broken_off):
    """Memory, say; a copy of the model elsewhere is the same model."""
    paths, whole = broken_off
    copy = shutil.copytree(tiny_chat, paths[0].with_name("copy"))
    more = ("--device-memory", "300MB", "--kv", "host")
    assert ollm("batch", copy, *paths, *CPU, *more)[0] == 0
    assert texts(paths[1]) == whole


def test_two_runs_on_one_output(ollm, tiny_chat, tmp_path):
    """The second ends with one line, the first does not notice."""
    paths = write_rows(tmp_path / "in.jsonl", some_rows(3)), tmp_path / "out.jsonl"
    with BatchJob(*paths, settings={}):
        code, _, err = ollm("batch", tiny_chat, *paths, *CPU)
    assert code == 2
    assert is_one_line_error(err)
    assert "another run is writing there" in err


def test_ctrl_c_ends_it_soon_and_says_how_to_go_on(ollm, tiny_chat, tmp_path):
    """The same command then answers the rest, and the texts are those of one run."""
    rows = write_rows(tmp_path / "in.jsonl", long_rows(30))
    output = tmp_path / "out.jsonl"
    before = processor_seconds(resource.getrusage(resource.RUSAGE_CHILDREN))
    with start("batch", tiny_chat, rows, output, *CPU) as process:
        wait_for_answer(output, process)
        ticks = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    whole = processor_seconds(resource.getrusage(resource.RUSAGE_CHILDREN)) - before
    seconds = whole - sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
    assert process.returncode == 130
    assert is_one_line_error(err)
    assert "hint: the same command goes on" in err
    assert seconds < 2  # of the processor: by the clock, others may have had it
    before = output.read_text()
    assert 0 < len(before.splitlines()) < 30
    with output.open("a") as file:
        file.write('{"id": "torn')
    assert ollm("batch", tiny_chat, rows, output, *CPU)[0] == 0
    assert output.read_text().startswith(before)
    assert len(texts(output)) == 30


def test_a_directory_that_is_removed_is_told(tiny_chat, tmp_path):
    """In one line; the next run begins anew."""
    rows = write_rows(tmp_path / "in.jsonl", long_rows(30))
    output = tmp_path / "there" / "out.jsonl"
    output.parent.mkdir()
    with start("batch", tiny_chat, rows, output, *CPU) as process:
        wait_for_answer(output, process)
        shutil.rmtree(output.parent)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert is_one_line_error(err)
    assert "was removed while it was written" in err


def killed(model, directory, num_kills, seed):
    """Batches under `num_kills` kills, each held against one that was not killed."""
    rows = [  # that end one after another
        row(f"r{n}", "Says", temperature=0, max_tokens=3 * n + 1, ignore_eos=True)
        for n in range(16)
    ]
    rows += ["{oops", chat("c", "why?", temperature=0, max_tokens=5)]
    rows += [row("r1", "again"), row("much", "x" * 300)]
    program = Path(__file__).parents[1] / "batch_kills.py"
    done = subprocess.run(
        [
            sys.executable, program, model, write_rows(directory / "in.jsonl", rows), directory,
            str(num_kills), str(seed),
        ],
        capture_output=True, text=True, check=False, timeout=3000,
        env={**ENVIRONMENT, "TOKENIZERS_PARALLELISM": "false"},
    )  # fmt: skip
    log = directory / "log"
    assert done.returncode == 0, done.stderr + log.read_text()
    told = json.loads(done.stdout)
    assert told["kills"] == num_kills
    whole, *outputs = map(Path, told["outputs"])
    assert outputs
    for output in outputs:
        assert texts(output) == texts(whole)
        errors = read_lines(output.with_name(f"{output.stem}.errors.jsonl"))
        assert sorted(one["error"]["line"] for one in errors) == [17, 19, 20]
    left = {path.name for path in directory.iterdir()} - {"in.jsonl", "log"}
    names = {path.name for path in (whole, *outputs)}
    assert left == names | {name.replace(".jsonl", ".errors.jsonl") for name in names}


def test_killed_at_any_moment_it_goes_on(tiny_chat, tmp_path):
    """Real processes, kill -9: no row twice, none lost, no wrong text, nothing left behind."""
    killed(tiny_chat, tmp_path, 24, 1)


@pytest.mark.soak
def test_killed_at_many_moments_it_goes_on(tiny_chat, tmp_path):
    """Ten times as many."""
    killed(tiny_chat, tmp_path, 240, 2)


def test_the_bar_shows_rows_rate_and_time_left(monkeypatch, capsys):
    """On a terminal alone."""
    shown = BatchProgress(num_rows=10, num_found=2)
    bar = RowsBar(shown)
    bar(shown)
    bar.close()
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(batch, "_SHOWN_SECONDS", 0)
    bar = RowsBar(shown)
    bar(BatchProgress(10, 2, 3, 1, num_new_tokens=40, seconds=4.0))
    bar.on_pass(Progress("decode", 3, 4, 17, 0, 0))
    bar.close()
    err = capsys.readouterr().err
    for words in ("2/10 rows", "6/10 rows", "10.0 tokens/s", "1 failed", "pass over 17 tokens 75%"):
        assert words in err
