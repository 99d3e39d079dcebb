"""Parts of plugins that cannot be made, or do something else than they should."""

from __future__ import annotations

import pytest
from plugin_examples import USED, example, logits

import ollm
from ollm_core.errors import PluginError


@pytest.mark.parametrize("option", ["kv", "reader", "draft"])
@pytest.mark.parametrize("name", ["broken", "wrong"])
def test_a_factory_that_fails(install, tiny, ids, option, name):
    """A factory that raises, or returns something else, is one line that names the plugin."""
    registry = install(bad=USED)
    words = "RuntimeError: no such thing here" if name == "broken" else "is a int, expected a"
    with pytest.raises(PluginError, match=words) as caught:
        logits(tiny, ids(5), registry=registry, **{option: name})
    assert f"{name!r} of bad (ollm-example-bad 1.0)" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("buffer[0:64] = bytes(64)", "other bytes of"),
        ("offsets = [offset + 1 for offset in offsets]", "other bytes of"),
        ("raise OSError('no device')", "OSError: no device"),
    ],
)
def test_an_engine_is_tried_before_it_is_used(install, tiny, change, words):
    """An engine that does not bring the file's bytes is refused before a weight is read."""
    source = example("ollm_reading_engines")
    broken = source.replace(
        "        return offsets\n", f"        {change}\n        return offsets\n"
    )
    registry = install(bad=broken)
    with pytest.raises(PluginError, match=f"'buffered' of bad .*failed its test read.*{words}"):
        ollm.load(tiny, device="cpu", reader="buffered", registry=registry)
