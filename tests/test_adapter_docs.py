"""docs/adapters.md names everything that an adapter can say, and nothing that it cannot."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields
from pathlib import Path

import pytest

import ollm_core
from ollm_core import (
    CAPABILITIES,
    CacheKind,
    CatalogEntry,
    DecoderAdapter,
    Layout,
    ModelAdapter,
    ParameterSource,
    WeightPlan,
)

DOCS = Path(__file__).parents[1] / "docs"
TEXT = (DOCS / "adapters.md").read_text()
TABLES = {
    "## ModelAdapter": ModelAdapter,
    "## DecoderAdapter": DecoderAdapter,
    "## Layout": Layout,
    "## CacheKind and StateShape": CacheKind,
    "| field of `WeightPlan`": WeightPlan,
    "| field of `ParameterSource`": ParameterSource,
    "## CatalogEntry": CatalogEntry,
}
"""Where the table of each begins."""


def rows(start):
    """The first table at or after `start`, without its head: the cells of each row."""
    lines = TEXT[TEXT.index(f"\n{start}") + 1 :].splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("|"))
    found = []
    for line in lines[first + 2 :]:
        if not line.startswith("|"):
            break
        found.append([cell.strip() for cell in line.strip("|").split("|")])
    return found


def named(cell):
    """The names in the first cell of a row, arguments left out."""
    return re.findall(r"`(\w[\w-]*)", cell)


def members(cls):
    """What authors may give: public fields, or attributes and methods of the class itself."""
    if cls in (ModelAdapter, DecoderAdapter):
        own = {*vars(cls), *inspect.get_annotations(cls)}
        if cls is DecoderAdapter:  # these are made from its own
            own -= {*vars(ModelAdapter), *inspect.get_annotations(ModelAdapter)}
        return {name for name in own if not name.startswith("_")}
    return {field.name for field in fields(cls)}


@pytest.mark.parametrize("start", TABLES)
def test_every_member_has_its_row(start):
    """A new field or hook is told to authors in the change that brings it; none is told that is not
    there.
    """
    names = [name for cells in rows(start) for name in named(cells[0])]
    assert len(names) == len(set(names))
    assert set(names) == members(TABLES[start])


def test_what_a_decoder_adapter_makes_is_named():
    """The members of ModelAdapter that it makes from its own."""
    made = {name for name in members(ModelAdapter) if name in vars(DecoderAdapter)}
    (sentence,) = re.findall(r"It makes\n(.*?) from the members below", TEXT, re.DOTALL)
    assert set(re.findall(r"`(\w+)`", sentence)) == made


def test_arguments_are_those_of_the_methods():
    """The calls in the tables are as an author writes them."""
    for start in ("## ModelAdapter", "## DecoderAdapter"):
        for cells in rows(start):
            for name, arguments in re.findall(r"`(\w+)\(([^)]*)\)`", cells[0]):
                parameters = list(inspect.signature(getattr(DecoderAdapter, name)).parameters)
                assert parameters[1:] == [one for one in arguments.split(", ") if one], name


def test_defaults_of_a_layout_are_told():
    """Each default path is in the row of its field."""
    told = {named(cells[0])[0]: cells[2] for cells in rows("## Layout")}
    for field in fields(Layout):
        if isinstance(field.default, str) and field.default:
            assert told[field.name] == f"`{field.default}`"


def test_every_capability_is_told_as_core_tells_it():
    """Its name, what it means word for word, and what happens without it."""
    found = {named(cells[0])[0]: cells[1:] for cells in rows("## Capabilities")}
    assert {name: cells[0] for name, cells in found.items()} == dict(CAPABILITIES)
    assert all(len(cells[1]) > 20 for cells in found.values())


def test_smaller_fields_are_named():
    """Those of data that has no table of its own."""
    for cls in (ollm_core.StateShape, ollm_core.StoredForm, ollm_core.Capability):
        section = TEXT[TEXT.index(cls.__name__) :]
        for name in members(cls) - {"support", "reason"}:
            assert f"`{name}" in section, f"{cls.__name__}.{name}"
    for kind in ("full", "unsupported", "not-implemented", "sliding", "recurrent"):
        assert kind in TEXT


def test_every_check_that_is_named_is_one():
    """A reader finds it in `ollm conformance list`."""
    from ollm_conformance.adapter import adapter_checks

    known = {check.id for check in adapter_checks()}
    for page in ("adapters.md", "adapter-tutorial.md"):
        text = (DOCS / page).read_text()
        asked = set(re.findall(r"--ollm-checks ([\w.,-]+)", text))
        named_checks = {one for part in asked for one in part.split(",")}
        named_checks |= set(re.findall(r"check\s+`([\w.-]+)`", text))
        assert named_checks
        assert not named_checks - known


@pytest.mark.parametrize("page", ["adapters.md", "adapter-tutorial.md"])
def test_links_lead_somewhere(page):
    """To a file beside the page, and to a heading that it has."""
    text = (DOCS / page).read_text()
    for target, anchor in re.findall(r"\]\(([\w.-]+)(?:#([\w-]+))?\)", text):
        other = (DOCS / target).read_text()
        headings = {
            title.lower().replace(" ", "-") for title in re.findall(r"^#+ (.*)$", other, re.M)
        }
        assert not anchor or anchor in headings, f"{target}#{anchor}"
