"""docs/adapters.md names all that an adapter can declare."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields
from pathlib import Path

import pytest

from ollm_adapter_transformers import FamilyAdapter
from ollm_core import (
    CAPABILITIES,
    CacheKind,
    CatalogEntry,
    DecoderAdapter,
    Layout,
    ModelAdapter,
    ParameterSource,
    StateShape,
    StoredForm,
    WeightPlan,
)

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "adapters.md").read_text()
SECTIONS = dict(part.split("\n", 1) for part in PAGE.split("\n## ")[1:])


def rows(section):
    """The name in the first cell of each row of the section's tables, arguments left out."""
    return set(re.findall(r"^\| `([\w-]+)[`(]", SECTIONS[section], re.MULTILINE))


def members(contract):
    """What a class declares itself and an author may give, in its body or by annotation alone."""
    names = {*vars(contract), *contract.__annotations__}
    return {name for name in names if not name.startswith("_")}


def names_of(data):
    """The fields of a dataclass."""
    return {field.name for field in fields(data)}


def test_every_capability_is_named():
    """A table has all, and no other."""
    assert rows("Capabilities") == CAPABILITIES.keys()


def test_every_member_is_named():
    """Each of ModelAdapter is in its table, and what its two base classes add in their own."""
    assert rows("ModelAdapter") == members(ModelAdapter)
    assert rows("DecoderAdapter") == members(DecoderAdapter) - members(ModelAdapter)
    found_out = {"is_part"}  # of one model
    assert rows("FamilyAdapter") == members(FamilyAdapter) - members(ModelAdapter) - found_out


@pytest.mark.parametrize(
    ("section", "tables"),
    [
        ("Layout", [Layout]),
        ("Caches", [CacheKind]),
        ("Catalog", [CatalogEntry]),
        ("Parameters and tensors", [WeightPlan, ParameterSource]),
    ],
)
def test_every_field_is_named(section, tables):
    """The tables of a section have the fields of what it describes, and no other."""
    assert rows(section) == set().union(*map(names_of, tables))


@pytest.mark.parametrize(
    ("section", "data"), [("Caches", StateShape), ("Parameters and tensors", StoredForm)]
)
def test_fields_in_a_sentence(section, data):
    """What has two fields is described in a sentence that names them."""
    (sentence,) = re.findall(rf"A `{data.__name__}` has (.*?)\.\s", SECTIONS[section], re.DOTALL)
    assert names_of(data) <= set(re.findall(r"`(\w+)`", sentence))


def test_checks_that_are_named_exist():
    """A check that the page sends an author to is one of the suite."""
    from ollm_conformance.adapter import adapter_checks

    named = set(re.findall(r"check\s+`([a-z-]+\.[a-z-]+)`", PAGE))
    assert named
    assert named <= {check.id for check in adapter_checks()}


@pytest.mark.parametrize(
    ("section", "contract"), [("ModelAdapter", ModelAdapter), ("DecoderAdapter", DecoderAdapter)]
)
def test_calls_in_the_tables_are_those_of_the_code(section, contract):
    """Each method is shown with its arguments, as an author overrides it."""
    shown = dict(re.findall(r"^\| `(\w+)\(([^)]*)\)`", SECTIONS[section], re.MULTILINE))
    for name, arguments in shown.items():
        _, *parameters = inspect.signature(vars(contract)[name]).parameters
        assert ", ".join(parameters) == arguments, name
    methods = {name for name in members(contract) if inspect.isfunction(vars(contract).get(name))}
    assert shown.keys() == methods & rows(section)


@pytest.mark.parametrize("page", ["adapters.md", "adapter-tutorial.md", "plugins.md"])
def test_links_lead_to_a_page_and_a_heading(page):
    """Those to another page of docs, or inside the page."""
    text = (DOCS / page).read_text()
    targets = re.findall(r"\]\(([\w.-]*)(?:#([\w-]+))?\)", text)
    assert targets
    for target, anchor in targets:
        titles = re.findall(r"^#+ (.*)$", (DOCS / (target or page)).read_text(), re.MULTILINE)
        headings = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
        assert not anchor or anchor in headings, f"{target}#{anchor}"
