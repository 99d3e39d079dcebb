"""What an adapter can do, asked for by name."""

import pytest

from ollm_core import Capability, UnsupportedError
from ollm_core.plugins.registry import CAPABILITIES, limits, require


def test_require(site):
    """What is declared unsupported raises with the adapter's reason; the undeclared is full."""
    site.install("alpha")
    adapter = site.discover().adapters["alpha"]
    type(adapter).capabilities = {
        "drafts": Capability("unsupported", "state cannot go back"),
        "batch": Capability("not-implemented", "one at a time"),
        "truncate": Capability(),
    }
    require(adapter, "truncate")
    require(adapter, "kv-disk")
    assert limits(adapter) == {"batch": "one at a time", "drafts": "state cannot go back"}
    with pytest.raises(UnsupportedError, match="alpha does not support drafts: state cannot"):
        require(adapter, "drafts")
    with pytest.raises(UnsupportedError, match="does not support batch yet: one at a time"):
        require(adapter, "batch")
    with pytest.raises(ValueError, match="unknown capability"):
        require(adapter, "dratfs")


def test_capabilities_are_explained():
    """Every ability has a meaning of one line."""
    assert all(meaning and "\n" not in meaning for meaning in CAPABILITIES.values())
