"""What is told of cached texts: those of this run, and those on disk."""

from __future__ import annotations

import pytest
from asgi_calls import calls

from ollm_core.api import load
from ollm_core.kv.disk.inventory import take_inventory
from ollm_core.server.app import open_app
from ollm_core.server.cached import CachedTexts
from ollm_core.server.service import Service


@pytest.mark.parametrize("is_there", [True, False])
def test_texts_on_disk_are_told_as_cache_list_has_them(tiny_chat, tmp_path, is_there):
    """Of an earlier run too; a directory that is not there is none."""
    kept = tmp_path / "kept"
    with load(tiny_chat, device="cpu", kv="disk", kv_dir=kept) as model:
        with Service(model, "tiny", kv_dir=kept) as service:
            body = {"prompt": "hello " * 20, "max_tokens": 2}
            calls(open_app(service), ("/v1/completions", body))
        with Service(model, "tiny", kv_dir=kept if is_there else tmp_path / "none") as service:
            assert [one["place"] for one in service.cached.read()] == ["later runs"] * is_there
            if is_there:
                [told], [found] = service.cached.read(), take_inventory(kept).prefixes
                assert found.id.startswith(told["name"])
                assert told["tokens"] == len(found.prefix.token_ids)
                assert told["bytes"] == found.num_bytes


def test_the_disk_is_not_looked_at_each_time(tmp_path):
    """It is asked every two seconds, by everybody who has the page open."""

    class Nothing:
        def cached(self):
            return []

    texts = CachedTexts(Nothing(), lambda _: 0, tmp_path)
    assert texts.read() == []
    looked = texts._looked
    texts.read()
    assert texts._looked == looked
