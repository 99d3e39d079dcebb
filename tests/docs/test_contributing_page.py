"""CONTRIBUTING.md says where things live: the files of a change are there, and few."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MOST_FILES = 3
"""That a typical change touches, beside tests and pages that are generated."""
ROWS = re.findall(
    r"^\| (an? [\w ]+) \| (.+) \|$",
    (ROOT / "CONTRIBUTING.md").read_text().split("\n## Where does it live\n")[1].split("\n## ")[0],
    re.M,
)


def test_ten_changes_are_told():
    """At least."""
    assert len(ROWS) >= 10


@pytest.mark.parametrize(("change", "files"), ROWS)
def test_files_of_a_change(change, files):
    """Each file that has a name of its own is there, and a change has at most three."""
    named = set(re.findall(r"`([\w/.*-]+\.(?:py|md|json))`", files))
    assert 1 <= len(named) <= MOST_FILES
    for name in named:
        if not re.search("[A-Z]{4}", name.removesuffix("README.md")):  # no placeholder
            assert any([*at.glob(name)] for at in (ROOT / "ollm_core", ROOT)), name
