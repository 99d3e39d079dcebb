"""docs/generated/memory.md is what is planned now, and lower than what others publish."""

from __future__ import annotations

from pathlib import Path

import pytest
from memory_table import ROWS, memory_table, planned

PAGE = Path(__file__).parents[2] / "docs/generated/memory.md"


@pytest.fixture(scope="module")
def plans():
    """Each row with its two plans."""
    return list(planned())


def test_the_page_is_what_is_planned(plans):
    """Byte for byte; `make memory` writes it again."""
    assert [row for row, _, _ in plans] == list(ROWS)
    assert PAGE.read_text() == memory_table(plans)


def test_every_row_is_lower_than_published(plans):
    """In device memory, and in disk where that is published."""
    for row, smallest, _ in plans:
        if row.device:
            assert smallest.device_peak_bytes < row.device * 1e9
        if row.disk:
            assert smallest.weight_bytes + smallest.disk_bytes < row.disk * 1e9


def test_more_memory_is_never_slower(plans):
    """And the smallest memory is what its plan holds, to the byte."""
    for _, smallest, roomy in plans:
        assert smallest.device_peak_bytes == smallest.device_memory
        assert smallest.device_memory == roomy.smallest_device_bytes < roomy.device_peak_bytes
        assert roomy.prefill_seconds <= smallest.prefill_seconds
        assert roomy.tokens_per_second >= smallest.tokens_per_second
