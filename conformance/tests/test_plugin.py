"""What the pytest plugin makes of outcomes, and the command line on top of it."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
from power import outcomes, results

from ollm_adapter_llama import LlamaAdapter
from ollm_conformance import AdapterConformance

NAMES = "declaration.names"


def suite(**attributes):
    """A test class for the Llama adapter."""
    return type("TestLlama", (AdapterConformance,), {"adapter": LlamaAdapter, **attributes})


class OddName(LlamaAdapter):
    """Fails one check."""

    name = "My Llama!"


def ollm(*arguments):
    """Run the command line."""
    command = [sys.executable, "-m", "ollm_core.cli", "conformance", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_an_expected_failure_is_told_with_its_reason():
    """It fails as the adapter says: that is no failure of the run."""
    expected = suite(adapter=OddName, expected_failures={NAMES: "the name is a joke"})
    (result,) = results(expected, [NAMES])
    assert (result.outcome, result.detail) == ("expected failure", "the name is a joke")


def test_an_expected_failure_that_passes_is_a_failure():
    """Expectations are strict, or they would outlive what they excuse."""
    assert outcomes(suite(expected_failures={NAMES: "not true"}), [NAMES]) == {NAMES: "failed"}


def test_an_expected_failure_of_no_check_is_an_error():
    """A misspelled id would excuse nothing, and nobody would notice."""
    with pytest.raises(AssertionError, match="expected a run of pytest"):
        outcomes(suite(expected_failures={"declaration.nmaes": "misspelled"}), [NAMES])


def test_a_skip_that_nobody_declared_is_a_failure():
    """A capability that is declared full, or not at all, must be shown."""

    class Skipping(AdapterConformance):
        adapter = LlamaAdapter

        @pytest.fixture(autouse=True)
        def _not_today(self):
            pytest.skip("not today")

    (result,) = results(Skipping, [NAMES])
    assert result.outcome == "failed"
    assert "not today" in result.detail


def test_a_failure_says_what_and_where(capfd):
    """Adapter, check, what must hold, what was found, where to look."""
    results(suite(adapter=OddName), [NAMES])
    told = capfd.readouterr().out
    assert "My Llama! fails check declaration.names" in told
    assert "must hold: The adapter has a proper name" in told
    assert "found:     name: expected small letters" in told
    assert "look at:   `name`, `model_types`" in told


@pytest.mark.parametrize("report", ["md", "json", "junit"])
def test_reports(report, tmp_path):
    """Each form names the check and what became of it; stdout stays empty with --out."""
    path = tmp_path / "report"
    ran = ollm("run", "llama", "--checks", NAMES, "--report", report, "--out", str(path))
    assert (ran.returncode, ran.stdout) == (0, ""), ran.stderr
    text = path.read_text()
    if report == "json":
        (found,) = json.loads(text)["results"]
        assert (found["adapter"], found["check"], found["outcome"]) == ("llama", NAMES, "passed")
    elif report == "md":
        assert f"| `{NAMES}` |" in text
        assert "| yes |" in text
    else:
        assert text.startswith("<?xml")
        assert 'tests="1"' in text
        assert 'failures="0"' in text


def test_no_adapter_is_an_error():
    """An unknown name is exit code 4 and names what is installed; pytest alone refuses too."""
    ran = ollm("run", "lama")
    assert ran.returncode == 4
    assert "no adapter 'lama' is installed" in ran.stderr
    assert re.search("installed: .*llama", ran.stderr)
    command = [sys.executable, "-m", "pytest", "--pyargs", "ollm_conformance.suite", "-q"]
    for arguments in ([], ["--ollm-adapter", "lama"]):
        plain = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
        assert plain.returncode not in (0, 5), plain.stdout
        assert re.search("installed: .*llama", plain.stdout + plain.stderr)


def test_the_support_table_is_checked(tmp_path):
    """A table that is not what was found is refused, with what to do."""
    found = tmp_path / "results.json"
    ran = ollm("run", "llama", "--checks", NAMES, "--report", "json")
    fields = json.loads(ran.stdout)["results"][0]
    fields["subject"] = fields.pop("adapter")
    found.write_text(json.dumps({"results": [fields]}))
    table = tmp_path / "support.md"
    assert ollm("table", str(found), "--out", str(table)).returncode == 0
    assert ollm("table", str(found), "--check", str(table)).returncode == 0
    table.write_text(table.read_text().replace("yes", "no"))
    stale = ollm("table", str(found), "--check", str(table))
    assert stale.returncode == 1
    assert "make support" in stale.stderr
    found.write_text("[1]")
    assert ollm("table", str(found)).returncode == 2
