"""Files of states: damaged, half written, of another dtype, and the user's own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import strategies as st
from kept_states import (
    GEOMETRY,
    PROMPT,
    found,
    keep_a_run,
    keeping,
    run,
)

tokens = st.lists(st.integers(0, 100), min_size=1, max_size=9)


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "header", "other"])
def test_a_damaged_state_is_not_believed(tmp_path, damage):
    """The next shorter one is taken, and the damaged file is gone."""
    keep_a_run(tmp_path, PROMPT)
    (path,) = tmp_path.glob("ollm-states-*/21-*.state")
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[4096 + 30] ^= 1
    elif damage == "header":
        data[20:60] = b"x" * 40
    elif damage == "other":
        data = bytearray(next(tmp_path.glob("ollm-states-*/20-*.state")).read_bytes())
    path.write_bytes({"cut": data[:-1], "empty": b""}.get(damage, data))
    assert found(tmp_path, [*PROMPT, 60]) == 20
    assert not path.exists() or path.read_bytes() != data


def test_states_of_another_dtype_have_files_of_their_own(tmp_path):
    """A run in one dtype neither finds nor removes what one in another has kept."""
    keep_a_run(tmp_path, PROMPT)
    files = {path.name for path in tmp_path.glob("ollm-states-*/*.state")}
    with keeping(tmp_path, replace(GEOMETRY, dtype=torch.float16)) as store:
        for num_tokens in (20, 21):
            tokens = torch.tensor(PROMPT[:num_tokens])
            assert not store._files.has(tokens)
            assert store._files.read(tokens) is None
    assert {path.name for path in tmp_path.glob("ollm-states-*/*.state")} == files
    assert found(tmp_path, [*PROMPT, 60]) == 21


def test_a_pass_that_fails_leaves_no_file(tmp_path):
    """Nor do names without content."""
    with keeping(tmp_path) as store:
        sequence = store.new_sequence()
        run(store, sequence, [], PROMPT, chunk=4, layers=(0, 1))
        assert list(tmp_path.glob("ollm-states-*/new-*"))
        store.truncate(sequence, 0)
        assert not list(tmp_path.glob("ollm-states-*/*"))


def test_files_are_the_users_own(tmp_path):
    """The states of a document are as private as the document."""
    keep_a_run(tmp_path, PROMPT)
    (directory,) = tmp_path.glob("ollm-states-*")
    assert directory.stat().st_mode & 0o777 == 0o700
    files = list(directory.iterdir())
    assert files
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}
