"""Options in the forms that users of transformers know."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ollm
from ollm_core import InputError
from ollm_core.device.select import pick_device, planned_device
from ollm_core.errors import DeviceError
from ollm_core.memory.sizes import parse_size
from ollm_core.options import count, device_name, dtype_name


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


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), -1, np.int64(-1)])
def test_a_device(device: Any):
    """By name, itself, or by the number that a pipeline of transformers takes."""
    assert pick_device(device) == torch.device("cpu")


def test_devices_that_need_not_be_here():
    """Numbers are GPUs."""
    assert planned_device(1) == planned_device(torch.device("cuda", 1)) == torch.device("cuda:1")
    assert device_name(torch.device("cuda")) == "cuda"


@pytest.mark.parametrize("device", [None, True, 1.0, -2, [0], {"": 0}])
def test_what_is_no_device(device: Any):
    """One line."""
    with pytest.raises(InputError, match=r"device is .*'cuda:0'"):
        pick_device(device)


def test_a_device_of_torch_that_cannot_compute():
    """As any that is not there."""
    with pytest.raises(DeviceError, match="'meta' is not there"):
        pick_device(torch.device("meta"))


@pytest.mark.parametrize(
    "size", [2 * 10**9, 2e9, np.int64(2 * 10**9), np.float32(2e9), "2GB", torch.tensor(2 * 10**9)]
)
def test_a_size(size: Any):
    """A whole number of any type, or with a unit."""
    assert parse_size(size) == 2 * 10**9


@pytest.mark.parametrize(
    "size", [True, 0.5, float("nan"), float("inf"), -2e9, np.bool_(True), None, b"2GB", [1], 1j]
)
def test_what_is_no_size(size: Any):
    """One line."""
    with pytest.raises(InputError, match=r"is not a memory size. hint: "):
        parse_size(size)


def test_a_size_of_many_digits():
    """Is a size that no machine has."""
    assert parse_size("9" * 400 + "GB") > 10**400


@pytest.mark.parametrize("value", [True, 1.0, "4", None, 0, -1, np.float64(3)])
def test_what_is_no_count(value: Any):
    """One line with the least that is one."""
    with pytest.raises(InputError, match=r"chunk_size is .*, expected at least 1"):
        count("chunk_size", value, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv": 3}, "there is no KV store 3"),
        ({"reader": None}, "there is no reading engine None"),
        ({"draft": ["lookup"]}, "there is no draft source"),
        ({"attention": True}, "attention is True"),
        ({"device_layers": 1.5}, "device_layers is 1.5"),
        ({"kv_dir": 3}, "3 is not a path"),
        ({"kv_dir": "a\0b"}, "is not a path"),
        ({"models_dir": b"x"}, "b'x' is not a path"),
        ({"draft": "lookup", "num_draft_tokens": "2"}, "num_draft_tokens is '2'"),
    ],
)
def test_wrong_options_of_load_are_one_line(tmp_path: Path, options: dict[str, Any], message: str):
    """Before the model is looked for."""
    with pytest.raises(InputError) as refused:
        ollm.load("no-such-model", **options)
    assert message in refused.value.message
    assert "\n" not in str(refused.value)


def test_a_model_takes_them_all(tiny: Path, tmp_path: Path, monkeypatch, ids):
    """And still computes what it did; the plan takes the same."""
    monkeypatch.chdir(tmp_path)
    same = {
        "dtype": torch.float32, "device": torch.device("cpu"), "device_memory": 2e8,
        "host_memory": np.int64(2 * 10**8), "chunk_size": np.int32(16),
        "device_layers": torch.tensor(2), "models_dir": tmp_path,
    }  # fmt: skip
    with ollm.load(tiny, device="cpu", chunk_size=16) as model:
        expected = model(ids(40)[None]).logits
    more = {"kv": "disk", "kv_dir": Path("kv"), "draft": "lookup", "num_draft_tokens": np.int8(3)}
    with ollm.load(Path(tiny.name), **same, **more) as model:
        assert torch.equal(model(ids(40)[None]).logits, expected)
        assert model.weights.held.layer_limits.device == 2
    found = ollm.plan(Path(tiny.name), **same, context=np.int64(512), batch=np.int64(2))
    assert (found.dtype, found.device, found.batch, found.context) == ("float32", "cpu", 2, 512)
    assert found.device_memory == 200_000_000
