"""Traces: bytes without data, and shortcuts that give what torch gives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ollm_core.memory.tracker import (
    _ELEMENTWISE,
    _IN_PLACE,
    _SHAPED_AS,
    AllocationTracker,
    concatenated,
    elementwise,
    mean,
    traced_peak,
)

BINARY = ("Tensor", "logaddexp.default")
SECOND_IS_A_NUMBER = ("clamp.default", "pow.Tensor_Scalar")
DTYPES = (torch.bfloat16, torch.float32, torch.int64)


def steps(tensor):
    """How far apart numbers lie along each dimension that has more than one."""
    return [step for step, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


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
    assert steps(told) == steps(given_by_torch)


@pytest.mark.parametrize("func", sorted(_ELEMENTWISE, key=str), ids=str)
def test_every_shortcut_gives_what_torch_gives(func):
    """On the kinds of tensors that layers have."""
    for dtype in (torch.bfloat16, torch.float32):
        value = torch.empty(2, 3, 4, dtype=dtype, device="meta")
        args = (value, value[0, 0]) if str(func).endswith(BINARY) else (value,)
        args = (value, 2) if str(func).endswith(SECOND_IS_A_NUMBER) else args
        told, given_by_torch = elementwise(args), func(*args)
        assert told is not None
        assert (told.shape, told.dtype) == (given_by_torch.shape, given_by_torch.dtype)
        assert steps(told) == steps(given_by_torch)


@pytest.mark.parametrize("func", sorted(_SHAPED_AS, key=str), ids=str)
@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 0, 1), (1, 0, 2)])
def test_what_stands_for_another_gives_what_that_gives(func, axes):
    """Of tensors that lie in any way."""
    value = torch.empty(2, 3, 4, device="meta").permute(axes)
    for other in (value, value.contiguous(), value[..., :1], value.permute(0, 1, 2)[:1]):
        shown = (value[..., ::2], other[..., ::2]) if "logaddexp" in str(func) else (other,)
        args = (*shown, -1, 1) if "clamp" in str(func) else shown
        told, given_by_torch = _SHAPED_AS[func](*shown), func(*args)
        assert (told.shape, told.dtype) == (given_by_torch.shape, given_by_torch.dtype)
        assert steps(told) == steps(given_by_torch)


@given(tensors(), st.lists(st.integers(-3, 2), min_size=1, max_size=2, unique=True), st.booleans())
def test_a_mean_is_what_torch_gives(value, dims, keepdim):
    """Over any dimensions, or nothing is told."""
    dims = [dim for dim in dims if -value.dim() <= dim < value.dim()]
    if len({dim % value.dim() for dim in dims}) < len(dims):
        return
    told = mean(value, dims, keepdim)
    if told is None:
        return
    given_by_torch = torch.ops.aten.mean.dim(value, dims, keepdim)
    assert (told.shape, told.dtype) == (given_by_torch.shape, given_by_torch.dtype)
    assert steps(told) == steps(given_by_torch)


@given(st.lists(tensors(), min_size=1, max_size=3), st.sampled_from([0, 1, -1]))
def test_what_is_put_together_is_what_torch_gives(values, dim):
    """Along any dimension, or nothing is told."""
    sizes = {tuple(n for i, n in enumerate(one.shape) if i != dim % 3) for one in values}
    if len(sizes) > 1 or values[0].dim() < 3:
        return
    told = concatenated(values, dim)
    if told is None:
        return
    given_by_torch = torch.cat(values, dim)
    assert (told.shape, told.dtype) == (given_by_torch.shape, given_by_torch.dtype)
    assert steps(told) == steps(given_by_torch)


@pytest.mark.parametrize("func", sorted(_IN_PLACE, key=str), ids=str)
def test_what_is_done_in_place_takes_nothing(func):
    """As on a CPU."""
    value = torch.ones(4, 4)
    args = (value, value.clone(), value.clone()) if "addcmul" in str(func) else (value,)
    with AllocationTracker("cpu") as tracker:
        assert func(*args) is value
    assert tracker.peak == 0


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
