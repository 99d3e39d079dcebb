"""Buffers take the memory that they are for, and no more."""

from __future__ import annotations

from pathlib import Path

import pytest

from ollm_core.device.buffers import HUGE_PAGE, PAGE, aligned_buffer


def flags_at(address):
    """What the kernel may do with the map that holds an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, rest = line.partition(" ")
        if "-" in first and not first.endswith(":"):
            begin, end = (int(part, 16) for part in first.split("-"))
            inside = begin <= address < end
        elif inside and first == "VmFlags:":
            return rest.split()
    raise AssertionError(f"{address:x} is not mapped")


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux tells of maps")
@pytest.mark.parametrize("num_bytes", [HUGE_PAGE, 2 * HUGE_PAGE + 1, 3 * HUGE_PAGE - PAGE])
def test_no_huge_page_past_the_end(num_bytes):
    """Whole huge pages may be taken; the part at the end goes page by page."""
    buffer = aligned_buffer(num_bytes)
    begin = buffer.data_ptr()
    assert begin % HUGE_PAGE == 0
    whole = num_bytes // HUGE_PAGE * HUGE_PAGE
    assert "hg" in flags_at(begin)
    assert "hg" in flags_at(begin + whole - 1)
    assert "hg" not in flags_at(begin + whole)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux tells of maps")
def test_small_pages():
    """For what is filled once."""
    buffer = aligned_buffer(2 * HUGE_PAGE, huge=False)
    assert buffer.data_ptr() % PAGE == 0
    assert "hg" not in flags_at(buffer.data_ptr())
