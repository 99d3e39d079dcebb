"""What users pass, in the forms that users of transformers know, made one form."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ollm_core import InputError
from ollm_core.values import count, dtype_name, parse_tokens


@pytest.mark.parametrize(
    "dtype", ["bfloat16", "torch.bfloat16", torch.bfloat16], ids=["name", "torch's", "dtype"]
)
def test_a_dtype(dtype: Any):
    """By name, by torch's name, or itself."""
    assert dtype_name(dtype) == "bfloat16"


def test_other_names_of_dtypes():
    """Those of torch; None is auto, as in transformers."""
    assert [dtype_name(one) for one in ("half", torch.float, None, "auto")] == [
        "float16", "float32", "auto", "auto",
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, "bf16", "nn", 16, True, float])
def test_what_is_no_dtype(dtype: Any):
    """One line with those that there are."""
    with pytest.raises(InputError, match=r"dtype is .*one of: auto, float32") as refused:
        dtype_name(dtype)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("value", [True, 1.0, "4", None, 0, -1, np.float64(3)])
def test_what_is_no_count(value: Any):
    """One line with the least that is one."""
    with pytest.raises(InputError, match=r"chunk_size is .*, expected at least 1"):
        count("chunk_size", value, 1)


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    """No rates that this machine has kept, no models."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("OLLM_MODELS", raising=False)
    return tmp_path / "home"


@pytest.mark.parametrize(
    ("text", "count"), [("100k", 100_000), ("8192", 8192), (5, 5), ("1.5k", 1500), ("1M", 10**6)]
)
def test_contexts(text, count):
    """As people write them."""
    assert parse_tokens(text) == count
