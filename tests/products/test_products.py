"""Products in half precision without instructions for it: float32 sums, whatever the rows."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from ollm_core.memory.tracker import AllocationTracker
from ollm_core.products import products as module
from ollm_core.products.products import CpuProducts
from ollm_core.products.small_batch import MOST_ROWS, load_kernel

COMPILED = load_kernel()
HALF_UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def random(*shape, dtype=torch.bfloat16, seed=0):
    """Normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same(found, expected, dtype):
    """Both are one sum in float32, in another order, rounded once."""
    assert found.dtype == dtype
    assert found.shape == expected.shape
    error = (found.float() - expected).abs()
    assert bool((error <= 1.01 * HALF_UNIT[dtype] * expected.abs() + 1e-4).all())


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 70),
    num_outputs=st.integers(1, 37),
    size=st.integers(1, 150),
    compiled=st.booleans(),
    instructions=st.booleans(),
    dtype=st.sampled_from(list(HALF_UNIT)),
    biased=st.booleans(),
)
def test_any_shape_is_a_float32_sum(rows, num_outputs, size, compiled, instructions, dtype, biased):
    """Any number of rows and any form of the matrix, with and without a bias."""
    kernel = COMPILED if compiled and dtype == torch.bfloat16 else None
    products = CpuProducts(dtype, kernel, instructions=instructions and kernel is not None)
    states, bias = random(2, rows, size, dtype=dtype), random(num_outputs, dtype=dtype, seed=2)
    matrix = random(num_outputs, size, dtype=dtype, seed=1)
    expected = states.float() @ matrix.float().t()
    same(states @ products.weight(matrix.t().contiguous()), expected, dtype)
    expected = expected + bias.float() if biased else expected
    found = functional.linear(states, products.weight(matrix), bias if biased else None)
    same(found, expected, dtype)


@pytest.mark.parametrize("rows", [1, 2, MOST_ROWS, MOST_ROWS + 1, 300])
def test_tiles_of_a_large_matrix(rows, monkeypatch):
    """A matrix of several tiles, the last of them smaller, and rows that are longer than a tile."""
    monkeypatch.setattr(module, "TILE_BYTES", 4096)
    for shape in ((300, 20), (300, 64), (5, 2000)):
        products = CpuProducts(torch.bfloat16, None)
        states, matrix = random(rows, shape[1]), random(*shape, seed=1)
        found = functional.linear(states, products.weight(matrix))
        same(found, states.float() @ matrix.float().t(), torch.bfloat16)
        found = states @ products.weight(matrix.t().contiguous())
        same(found, states.float() @ matrix.float().t(), torch.bfloat16)


def test_infinite_and_no_numbers_stay_so():
    """Neither becomes a number in the compiled kernel."""
    products = CpuProducts(torch.bfloat16, COMPILED)
    states = torch.tensor([[float("inf"), 1.0], [float("nan"), 1.0], [3e38, 3e38]]).bfloat16()
    found = functional.linear(states, products.weight(torch.ones(4, 2).bfloat16()))
    assert bool(found[0].isposinf().all())
    assert bool(found[1].isnan().all())
    assert bool(found[2].isposinf().all())


def test_what_is_no_product_is_torch_itself():
    """Views, sums and lookups give plain tensors, and the transposed matrix multiplies too."""
    products = CpuProducts(torch.bfloat16, COMPILED)
    matrix = random(8, 6)
    weight = products.weight(matrix)
    assert type(weight + 1) is torch.Tensor
    assert torch.equal(weight[2:4], matrix[2:4])
    assert torch.equal(functional.embedding(torch.tensor([3]), weight), matrix[3:4])
    same(random(5, 6) @ weight.T, random(5, 6).float() @ matrix.float().t(), torch.bfloat16)
    assert weight.data_ptr() == matrix.data_ptr()


def test_the_buffer_is_no_larger_than_a_tile():
    """Of the longest rows that there are, and never beyond its limit."""
    products = CpuProducts(torch.bfloat16, None)
    assert products.buffer_bytes == module.TILE_BYTES
    products.expect(640)
    assert products.buffer_bytes == 4 * module.TILE_OUTPUTS * 640
    states, matrix = random(300, 640), random(1100, 640, seed=1)
    found = functional.linear(states, products.weight(matrix))
    same(found, states.float() @ matrix.float().t(), torch.bfloat16)
    products.expect(1 << 20)
    assert products.buffer_bytes == module.TILE_BYTES


@pytest.mark.parametrize(
    ("rows", "instructions"),
    [(1, True), *((rows, False) for rows in (2, MOST_ROWS, MOST_ROWS + 1, 300))],
)
def test_a_trace_sees_what_a_product_takes(rows, instructions):
    """The peak beside output and buffer is that of a run, and at most `scratch_bytes`."""
    peaks = []
    for device in ("cpu", "meta"):
        products = CpuProducts(torch.bfloat16, COMPILED, instructions=instructions)
        weight = products.weight(torch.zeros(2000, 640, dtype=torch.bfloat16, device=device))
        states = torch.zeros(rows, 640, dtype=torch.bfloat16, device=device)
        functional.linear(states, weight)  # the buffer is made
        with AllocationTracker(device) as tracker:
            output = functional.linear(states, weight)
        peaks.append(tracker.peak - output.nbytes)
    assert 0 < peaks[1] <= products.scratch_bytes(rows, 640)
    assert peaks[0] <= peaks[1]


THREADS = """
import torch
from ollm_core.products.small_batch import load_kernel

kernel = load_kernel()
output = torch.zeros(2, 8).bfloat16()
kernel(torch.ones(2, 4), torch.ones(8, 4).bfloat16(), None, output)
assert bool((output == 4).all())
print(torch.get_num_threads())
"""


@pytest.mark.parametrize("number", ["1", "2"])
def test_torch_keeps_its_threads(number):
    """numba starts its own: how many torch has, and so the bits of all else, stays as it was."""
    done = subprocess.run(
        [sys.executable, "-c", THREADS],
        env={**os.environ, "OMP_NUM_THREADS": number},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == number
