"""Which products a model is given, and that a kernel which is wrong here is not used."""

from __future__ import annotations

import logging

import pytest
import torch

from ollm_core.products import select
from ollm_core.products.products import CpuProducts
from ollm_core.products.small_batch import SmallBatch

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh():
    """Each test looks for the kernel anew."""
    select._small_batch.cache_clear()
    yield
    select._small_batch.cache_clear()


def test_torch_itself_where_it_is_exact_or_fast():
    """For exact runs, float32 and GPUs torch's own products are taken."""
    with select.without_instructions():
        assert select.choose_products(torch.bfloat16, CPU, "exact") is None
        assert select.choose_products(torch.float32, CPU, "fast") is None
        assert select.choose_products(torch.bfloat16, torch.device("cuda"), "fast") is None
        assert isinstance(select.choose_products(torch.bfloat16, CPU, "fast"), CpuProducts)
        assert isinstance(select.choose_products(torch.float16, CPU, "fast"), CpuProducts)


def test_instructions_are_used(monkeypatch):
    """A processor that has them multiplies by torch, but for one row."""
    monkeypatch.setattr(select, "has_instructions", lambda dtype: True)
    assert select.choose_products(torch.float16, CPU, "fast") is None
    products = select.choose_products(torch.bfloat16, CPU, "fast")
    matrix, kernel = torch.ones(4, 3).bfloat16(), products.small_batch
    assert kernel is not None
    assert products.bind([matrix], 2) == [matrix]
    (bound,) = products.bind([matrix], 1)
    assert bound.products is products
    assert products.buffer_bytes == products.scratch_bytes(9, 3) == 0
    monkeypatch.setattr(select, "_small_batch", lambda: None)
    assert select.choose_products(torch.bfloat16, CPU, "fast") is None


def test_the_kernel_works_here():
    """It passes its trial on this processor."""
    assert select._small_batch() is not None


def test_a_wrong_kernel_is_not_used(monkeypatch, caplog):
    """One that gives other numbers is told in one line, and tiles do its work."""

    class Wrong(SmallBatch):
        def __init__(self):
            pass

        def __call__(self, states, weight, bias, output):
            output.copy_(states @ weight.float().t())  # no bias

    monkeypatch.setattr(select, "load_kernel", Wrong)
    with select.without_instructions(), caplog.at_level(logging.WARNING, "ollm"):
        products = select.choose_products(torch.bfloat16, CPU, "fast")
    assert products.small_batch is None
    (record,) = caplog.records
    assert "not used on this processor: it gives other numbers" in record.getMessage()


def test_without_numba_tiles_do_the_work(monkeypatch):
    """The extra may be missing."""

    def missing():
        raise ImportError

    monkeypatch.setattr(select, "load_kernel", missing)
    with select.without_instructions():
        assert select.choose_products(torch.bfloat16, CPU, "fast").small_batch is None
