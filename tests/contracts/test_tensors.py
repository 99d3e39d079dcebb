"""What an author may say of stored tensors, and what is refused before anything is read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ollm_core import ParameterSource, StoredForm, TensorInfo, WeightPlan
from ollm_core.errors import PluginError


def test_rows_of_a_tensor_are_where_they_lie():
    """A slice of the first dimension: the same file, further on."""
    whole = TensorInfo("a", "BF16", (6, 4, 5), Path("x"), 100, 6 * 4 * 5 * 2)
    part = whole.rows(2, 5)
    assert (part.shape, part.offset, part.num_bytes) == ((3, 4, 5), 100 + 2 * 40, 120)
    row = whole.row(3)
    assert (row.name, row.shape, row.offset, row.num_bytes) == ("a[3]", (4, 5), 220, 40)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ParameterSource("a"), r"must be a tuple of names, got 'a'. hint: write .*'a',"),
        (lambda: ParameterSource(()), "must be a tuple of names"),
        (lambda: ParameterSource(("a", "b")), "2 tensors, from 'a' on, need a transform"),
        (
            lambda: ParameterSource(("a",), torch.neg, stored=(StoredForm("F32", (1,)),) * 2),
            "stored has 2 forms for 1 tensors",
        ),
    ],
)
def test_what_no_parameter_can_be_made_of(make, words):
    """Is refused where it is written, with what to write."""
    with pytest.raises(PluginError, match=words):
        make()


def test_a_plan_names_all_its_sources():
    """Those of parameters, then each expert's."""
    one, two, three = (ParameterSource((name,)) for name in "abc")
    plan = WeightPlan({"x": one}, experts={"y": (two, three)})
    assert list(plan.sources()) == [one, two, three]
