"""`ollm plan` and `ollm doctor`: what is printed where, and exit codes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("home")

GPU = ["--device", "cuda", "--device-memory", "8GB", "--host-memory", "16GB"]
FIELDS = {
    "fits", "device_peak_bytes", "host_peak_bytes", "disk_bytes", "weight_bytes", "kv_bytes",
    "bytes_read_per_token", "prefill_seconds", "tokens_per_second", "limited_by", "placement",
    "device_bytes", "host_bytes", "smallest_device_bytes", "largest_context", "changes", "rates",
}  # fmt: skip


def test_json_is_one_object(ollm):
    """And nothing on stderr."""
    code, out, err = ollm("plan", "smollm2-135M", *GPU, "--context", "8k", "--json")
    found = json.loads(out)
    assert code == 0
    assert not err
    assert found.keys() >= FIELDS
    assert found["fits"] is True
    assert found["moments"][0]["name"] == "opened"


def test_the_page_shows_what_is_printed(ollm):
    """Its plans, line by line."""
    page = (Path(__file__).parents[2] / "docs/planning.md").read_text()
    shown = re.findall(r"^    \$ ollm (plan .*)\n((?:    .*\n|\n)+)", page, re.MULTILINE)
    assert len(shown) == 2
    for command, expected in shown:
        _, out, err = ollm(*command.split())
        found = [line.strip() for line in (out + err).splitlines() if line.strip()]
        assert found == [line.strip() for line in expected.splitlines() if line.strip()]


def test_table_and_plot(ollm):
    """For people: each part with its size, the rates and where they come from, a bar per pass."""
    code, out, err = ollm("plan", "llama3-8B-chat", *GPU, "--context", "20k", "--plot")
    assert code == 0
    assert not err
    for expected in ("resident weights", "/ limit 8 GB", "(assumed; run `ollm doctor` to measure)"):
        assert expected in out
    assert max(map(len, out.splitlines())) <= 120
    bars = [line for line in out.splitlines() if line.endswith("B") and "|" in line]
    assert len({line.rindex("|") for line in bars}) == 1
    assert bars[0].startswith("opened")


@pytest.mark.parametrize("as_json", [False, True])
def test_what_does_not_fit_exits_with_3(ollm, as_json):
    """One line and a hint, whose numbers do; --json still prints its object."""
    arguments = ["plan", "llama3-8B-chat", "--device", "cuda", "--device-memory", "300MB"]
    arguments += ["--host-memory", "8GB", "--context", "10k"]
    code, out, err = ollm(*arguments, *(["--json"] if as_json else []))
    assert code == 3
    error, hint = err.splitlines()
    assert error.startswith("error: ")
    assert hint.startswith("hint: allow --device-memory ")
    assert json.loads(out)["fits"] is False if as_json else not out
    arguments[5] = hint.split("--device-memory ")[1].split(",")[0].split()[0]
    assert ollm(*arguments)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["llama3-8B-chat", "--device-memory", "8"], 2, "'8' is not a memory size"),
        (["llama3-8B-chat", "--device-memory", "-8GB"], 2, "'-8GB' is not a memory size"),
        (["llama3-8B-chat", "--context", "x"], 2, "'x' is not a number of tokens"),
        (["llama3-8B-chat", "--batch", "0"], 2, "--batch"),
        (["llama3-9B"], 4, "there is no model 'llama3-9B'"),
        (["./no/where"], 2, "there is no directory"),
    ],
)
def test_errors_are_one_line(ollm, arguments, code, message):
    """And a hint where there is one; never a traceback."""
    found, out, err = ollm("plan", *arguments, "--json")
    assert found == code
    assert not out
    assert message in err.splitlines()[0]
    assert len(err.splitlines()) <= 2
