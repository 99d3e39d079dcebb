"""What PyPI shows of each distribution: license, addresses, and links that lead somewhere."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from ollm_conformance.new_adapter import PUBLISHED

ROOT = Path(__file__).parents[2]
DISTRIBUTIONS = [
    ROOT,
    ROOT / "conformance",
    *sorted((ROOT / "adapters").glob("*")),
    *sorted((ROOT / "plugins").glob("*")),
]
PROJECTS = {
    path: tomllib.loads((path / "pyproject.toml").read_text())["project"] for path in DISTRIBUTIONS
}
HOME = PROJECTS[ROOT]["urls"]["Source"]
LINK = re.compile(r"\]\(\s*<?([^)\s>]+)|^\s*\[[^\]]+\]:\s*(\S+)|(?:src|href)=[\"']([^\"']+)", re.M)
KINDS = {"blob": Path.is_file, "raw": Path.is_file, "tree": Path.is_dir}


def links(text):
    """The targets of all links and images of a page in Markdown, code left out."""
    prose = re.sub(r"```.*?```|`[^`\n]*`", "``", text, flags=re.DOTALL)
    return ["".join(found) for found in LINK.findall(prose)]


def fault(target):
    """Why a link of a page on PyPI leads nowhere, or None."""
    if not re.match(r"(https://|mailto:|#)", target):
        return "is relative, which means nothing on PyPI"
    if target in (HOME, f"{HOME}#readme", f"{HOME}/issues") or not target.startswith(f"{HOME}/"):
        return None
    page = re.fullmatch(r"(blob|raw|tree)/main/([^#]+)(#.*)?", target.removeprefix(f"{HOME}/"))
    if page is None:
        return "is no page of the project"
    return None if KINDS[page[1]](ROOT / page[2]) else "is not in the tree"


@pytest.mark.parametrize("directory", DISTRIBUTIONS, ids=lambda path: path.name)
def test_links_of_a_readme_work_from_pypi(directory):
    """Every link and image is absolute, and one into the project names a file that is there."""
    page = directory / PROJECTS[directory]["readme"]
    found = links(page.read_text())
    assert found, f"{page} links nowhere, not even to the project"
    assert not {target: fault(target) for target in found if fault(target)}


@pytest.mark.parametrize(
    ("link", "told"),
    [
        ("[x](docs/plugins.md)", "relative"),
        ("![x](picture.png)", "relative"),
        ("[x]: ../README.md", "relative"),
        ('<img src="a.png">', "relative"),
        ("[x](//example.org)", "relative"),
        (f"[x]({HOME}/blob/main/docs/nothing.md)", "not in the tree"),
        (f"[x]({HOME}/blob/main/docs)", "not in the tree"),
        (f"[x]({HOME}/blob/master/README.md)", "no page"),
        (f"[x]({HOME}/README.md)", "no page"),
        (f"[x]({HOME}/blob/main/docs/plugins.md#hooks)", None),
        (f"[x]({HOME}/tree/main/docs)", None),
        ("[x](https://example.org/a)", None),
    ],
)
def test_links_that_lead_nowhere_are_seen(link, told):
    """Each form of a link is found in a page, and judged."""
    (target,) = links(f"`[code](not/a/link)` and {link}" if "]:" not in link else link)
    assert (told in fault(target)) if told else fault(target) is None


@pytest.mark.parametrize("directory", DISTRIBUTIONS, ids=lambda path: path.name)
def test_addresses_and_license(directory):
    """They are declared, lead into the tree, and the license is the project's own."""
    project = PROJECTS[directory]
    urls = project["urls"]
    assert urls.keys() == {"Homepage", "Documentation", "Source", "Issues", "Changelog"}
    assert not {url: fault(url) for url in urls.values() if fault(url)}
    assert all(url.startswith(HOME) for url in urls.values())
    assert project["license-files"] == ["LICENSE"]
    license_file = directory / "LICENSE"
    assert not license_file.is_symlink()  # a source distribution would keep the link
    assert license_file.read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_files_that_pages_name_are_there():
    """Every path in code type that begins at the root of the tree."""
    top = "adapters|benchmarks|conformance|docs|examples|ollm_core|tests"
    named = {
        (page.name, path)
        for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("*/README.md")]
        for path in re.findall(rf"`((?:{top})/[\w./-]+)`", page.read_text())
        if "NAME" not in path
    }
    assert len(named) > 50
    assert not {(page, path) for page, path in named if not (ROOT / path).exists()}


def test_there_is_one_address():
    """No file of the tree gives another address of the project; `copier update` goes there too."""
    owner_and_name = HOME.removeprefix("https://github.com/")
    assert PUBLISHED["_src_path"] == f"gh:{owner_and_name}"
    command = ["git", "grep", "-hoE", r"(github\.com/|gh:)[A-Za-z0-9_-]+/ollm-core[A-Za-z0-9_-]*"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    names = {line.removeprefix("github.com/").removeprefix("gh:") for line in found.stdout.split()}
    assert names == {owner_and_name}
