"""Traces: bytes without data, and shortcuts that give what torch gives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ollm_core.memory.tracker import _ELEMENTWISE, AllocationTracker, elementwise, traced_peak

DTYPES = (torch.bfloat16, torch.float32, torch.int64)


@st.composite
def tensors(draw):
    """A meta tensor [a, b, c], perhaps seen from another side, or one number."""
    shape = draw(st.tuples(*[st.sampled_from([1, 4])] * 3))
    made = torch.empty(shape, dtype=draw(st.sampled_from(DTYPES)), device="meta")
    return draw(
        st.sampled_from([made, made.transpose(0, 1), made[..., :1], made[0], made[0, 0, 0]])
    )


@given(
    tensors(),
    st.one_of(tensors(), st.sampled_from([2, 0.5])),
    st.sampled_from(["add", "mul", "sub"]),
)
def test_what_is_told_of_two_is_what_torch_gives(left, right, name):
    """Shape, dtype and strides, or nothing is told."""
    func = getattr(torch.ops.aten, name).Tensor
    told = elementwise((left, right))
    if told is None:
        return
    given_by_torch = func(left, right)
    assert (told.shape, told.dtype) == (given_by_torch.shape, given_by_torch.dtype)
    assert told.is_contiguous()
    assert given_by_torch.is_contiguous()


@pytest.mark.parametrize("func", sorted(_ELEMENTWISE, key=str), ids=str)
def test_every_shortcut_gives_what_torch_gives(func):
    """On the kinds of tensors that layers have."""
    for dtype in (torch.bfloat16, torch.float32):
        value = torch.empty(2, 3, 4, dtype=dtype, device="meta")
        args = (value, value[0, 0]) if str(func).endswith("Tensor") else (value,)
        args = (value, 2) if "pow" in str(func) else args
        told, given_by_torch = elementwise(args), func(*args)
        assert told is not None
        assert (told.shape, told.dtype) == (given_by_torch.shape, given_by_torch.dtype)
        assert told.stride() == given_by_torch.stride()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_trace_counts_what_a_run_allocates(dtype):
    """The same work on the meta device and on a CPU has the same peak."""

    def work(device):
        value = torch.ones(16, 32, dtype=dtype, device=device)
        value = torch.nn.functional.linear(value, value[:, :32].t() @ value, value[0]).triu_()
        turned = (value.t() * 2 + value.t()).exp()
        mixed = turned.float() * value.t() - turned
        return torch.cat([mixed.sigmoid(), torch.rsqrt(value.t().float()).neg()])

    with AllocationTracker("cpu") as tracker:
        result = work("cpu")
        del result
    assert tracker.peak > 0
    assert traced_peak(lambda: work("meta")) == tracker.peak


def test_inference_mode_hides_nothing():
    """Operations come whole there, and what they make inside is counted all the same."""

    def attention(length):
        query, keys = torch.ones(1, 2, length, 8), torch.ones(1, 1, length, 8)
        keys = keys.expand(-1, 2, -1, -1)  # which the product copies
        scores = torch.matmul(query, keys.transpose(2, 3))
        shares = torch.nn.functional.softmax(scores.bfloat16(), dim=-1, dtype=torch.float32)
        return shares[..., :-1] @ query[..., :-1, :]  # which it need not copy

    peaks = []
    for mode in (False, True):
        with torch.inference_mode(mode), torch.no_grad(), AllocationTracker("cpu") as tracker:
            attention(32)
        peaks.append(tracker.peak)
    assert peaks[0] == peaks[1] > 0
