"""The pages of docs/ as one site: each is in its contents, links lead somewhere, it is built."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
LINK = re.compile(r"\]\(\s*([^)\s]*?)(?:#([\w-]+))?\s*\)")


def prose(page):
    """A page without its code."""
    return re.sub(r"```.*?```|`[^`\n]*`", "``", (DOCS / page).read_text(), flags=re.DOTALL)


def anchors(text):
    """Those of its headings, as GitHub and the site make them."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_page_is_in_the_contents():
    """Once, and no other."""
    trees = re.findall(r"```\{toctree\}\n(.*?)```", (DOCS / "index.md").read_text(), re.DOTALL)
    told = [line for tree in trees for line in tree.splitlines() if line and line[0] != ":"]
    assert sorted(f"{name}.md" for name in told) == [page for page in PAGES if page != "index.md"]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    """Each to a file of the tree, and its anchor to a heading; without a network."""
    for target, anchor in LINK.findall(prose(page)):
        if "://" in target:
            continue
        path = (DOCS / page).parent / target if target else DOCS / page
        assert path.exists(), f"{page}: {target}"
        if anchor and path.suffix == ".md":
            assert anchor in anchors(path.read_text()), f"{page}: {target}#{anchor}"


@pytest.mark.soak  # CI builds no site: the checks above need no generator
def test_the_site_is_built(tmp_path):
    """Without a warning, and no page loads anything from elsewhere."""
    if importlib.util.find_spec("sphinx") is None:
        pytest.skip("pip install 'ollm-core[docs]'")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-c", DOCS / "site"]
    done = subprocess.run([*command, DOCS, tmp_path / "site"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    built = sorted((tmp_path / "site").rglob("*.html"))
    assert len(built) > len(PAGES)
    for path in built:
        loaded = re.findall(
            r"<(?:script|img|link|iframe)\b[^>]*\b(?:src|href)=\"([^\"]+)", path.read_text()
        )
        assert not [one for one in loaded if re.match(r"(https?:)?//", one)], path
    for path in (tmp_path / "site/_static").rglob("*.css"):
        assert not re.search(r"url\([\"']?(https?:)?//|@import", path.read_text()), path
