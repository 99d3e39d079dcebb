"""Once a pass that could have been gone on with is through, all that it gave is kept: its
checkpoint is gone, and whoever is killed then loses nothing.
"""

from __future__ import annotations

import errno
import shutil

import pytest
import torch
from broken_off_passes import SLIDING, Pass, broken_off, left, open_store
from kept_prefixes import GEOMETRY, content, expected_kv, numbers

from ollm_core.kv.disk.inventory import take_inventory
from ollm_core.kv.disk.layer_file import LayerFile


def as_killed(store, directory):
    """A copy of the store's home, as it would be left now."""
    directory.mkdir()
    home = shutil.copytree(store._disk.home.directory, directory / "ollm-kv-killed00")
    home.chmod(0o700)
    return directory


def lengths(directory):
    """How many tokens each prefix has that is kept."""
    return [len(one.prefix.token_ids) for one in take_inventory(directory).prefixes]


@pytest.mark.parametrize("geometry", [GEOMETRY, SLIDING])
@pytest.mark.parametrize("num_tokens", [30, 31, 32, 33])
def test_all_tokens_of_it_are_kept_at_once(tmp_path, geometry, num_tokens):
    """Those in a block that is not full, too; and the sequence goes on in a block of its own."""
    prompt = numbers(40)
    broken_off(tmp_path / "kv", prompt[:num_tokens], geometry)
    with open_store(tmp_path / "kv", geometry) as store:
        one = Pass(store, prompt[:num_tokens])
        assert one.first == 1
        one.run()
        one.finish()
        one.check()
        now = as_killed(store, tmp_path / "then")
        for begin in range(num_tokens, 40):  # as when decoding
            for layer_idx in range(2):
                both = expected_kv(prompt, layer_idx, geometry)[:, :, begin : begin + 1]
                store.append(layer_idx, one.sequence, both[0], both[1])
            store.keep(one.sequence, begin, prompt[begin : begin + 1])
        later = as_killed(store, tmp_path / "later")
    for directory, known in ((now, num_tokens), (later, 40), (tmp_path / "kv", 40)):
        assert (lengths(directory), left(directory)) == ([known], [])
        with open_store(directory, geometry) as store:
            sequence, num_found = store.find(prompt[:known])
            assert num_found == known
            for layer_idx in range(2):
                first = geometry.first_needed(layer_idx, known)
                pairs = store.blocks(layer_idx, sequence, first=first)
                found = torch.cat([torch.stack(pair) for pair in pairs], dim=2)
                assert torch.equal(
                    found, expected_kv(prompt, layer_idx, geometry)[:, :, first:known]
                )


def test_of_other_passes_full_blocks_are_kept_until_the_end(tmp_path):
    """What could not have been gone on with costs no write."""
    with open_store(tmp_path / "kv") as store:
        one = Pass(store, numbers(31))
        one.run(saving=False)
        one.finish()
        assert lengths(as_killed(store, tmp_path / "then")) == [28]
    assert lengths(tmp_path / "kv") == [31]


def test_where_the_end_cannot_be_written_the_rest_is_kept(tmp_path, monkeypatch):
    """As on a full disk: the sequence goes on, and what is kept at the end is all of it."""
    prompt = numbers(31)
    broken_off(tmp_path / "kv", prompt)
    with open_store(tmp_path / "kv") as store:
        one = Pass(store, prompt)
        one.run()
        free = [file.num_free for file in store._disk._files]
        real, refused = LayerFile.write, []

        def write(self, slot, data):
            if len(refused) < 1:
                refused.append(slot)
                raise OSError(errno.ENOSPC, "no space")
            real(self, slot, data)

        with monkeypatch.context() as patched:
            patched.setattr(LayerFile, "write", write)
            one.finish()
        assert len(refused) == 1
        assert lengths(as_killed(store, tmp_path / "then")) == [28]
        one.check()
        assert [file.num_free for file in store._disk._files] >= free
    assert lengths(tmp_path / "kv") == [31]
    with open_store(tmp_path / "kv") as store:
        sequence, num_found = store.find(prompt)
        assert num_found == 31
        assert torch.equal(content(store, 1, sequence), expected_kv(prompt, 1))
