"""How fast memory comes."""

from __future__ import annotations

import ollm_core.calibration.fresh_memory as fresh_memory


def test_every_page_is_taken_once(monkeypatch):
    """By the clock around the first writes, and nothing else."""
    buffers, clock = [], iter([10.0, 10.5])
    made = fresh_memory.aligned_buffer

    def make(num_bytes, *, huge):
        assert not huge
        buffers.append(made(num_bytes, huge=huge))
        return buffers[-1]

    monkeypatch.setattr(fresh_memory, "aligned_buffer", make)
    monkeypatch.setattr(fresh_memory.time, "perf_counter", lambda: next(clock))
    num_bytes = 5 * fresh_memory.PAGE + 7
    assert fresh_memory.measure_fresh_memory(num_bytes) == num_bytes / 0.5
    [buffer] = buffers
    assert buffer[:: fresh_memory.PAGE].tolist() == [1] * 6
    assert int(buffer.sum()) == 6
