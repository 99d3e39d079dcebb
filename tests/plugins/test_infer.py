"""Stored tensors, told from how a parameter is made of them."""

from __future__ import annotations

import pytest
import torch

from ollm_core import ParameterSource, StoredForm, UnsupportedError
from ollm_core.plugins.infer import infer_tensors

CASES = {
    # source, shape of the parameter, rows, what must be stored
    "as it is": (ParameterSource(("a",)), (4, 6), 0, [(4, 6)]),
    "turned": (ParameterSource(("a",), lambda t: t.T), (4, 6), 0, [(6, 4)]),
    "joined": (ParameterSource(("a", "b"), lambda *t: torch.cat(t)), (4, 6), 0, [(2, 6)] * 2),
    "joined at the end": (
        ParameterSource(("a", "b", "c"), lambda *t: torch.cat(t, -1)), (4, 6), 0, [(4, 2)] * 3,
    ),
    "a row": (ParameterSource(("a",), row=2), (4, 6), 8, [(8, 4, 6)]),
    "a row, turned": (ParameterSource(("a",), lambda t: t.T, row=0), (4, 6), 3, [(3, 6, 4)]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_is_stored(case):
    """Equal parts, cut or turned, which the transform makes the parameter of."""
    source, shape, rows, expected = CASES[case]
    found = list(infer_tensors(source, shape, "BF16", rows, {}))
    assert found == [
        (name, ("BF16", one)) for name, one in zip(source.tensors, expected, strict=True)
    ]
    if source.transform is not None:
        parts = [torch.zeros(one[1:] if rows else one) for one in expected]
        assert source.transform(*parts).shape == shape


def test_what_the_author_says_is_believed():
    """Whatever the transform would make of it."""
    source = ParameterSource(("a",), torch.neg, stored=(StoredForm("U8", (2, 2)),))
    assert list(infer_tensors(source, (4, 6), "BF16", 0, {})) == [("a", ("U8", (2, 2)))]


def test_what_cannot_be_told():
    """One line that says what to do."""

    def uneven(*parts):
        raise ValueError("not with equal parts")

    with pytest.raises(UnsupportedError, match="cannot be told from config") as refused:
        list(infer_tensors(ParameterSource(("a", "b"), uneven), (4, 6), "F32", 0, {}))
    assert "stored" in refused.value.hint
