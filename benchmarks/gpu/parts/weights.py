"""Writes the checkpoint that several parts want, while nothing is timed."""

from __future__ import annotations

from benchmarks.gpu.parts.checkpoints import llama
from benchmarks.gpu.parts.work import Tell, Work


def run(work: Work, tell: Tell, _: str = "") -> None:
    """Llama-3-8B with random weights."""
    found = llama(work)
    tell(
        "llama3-8b",
        f"{found.num_layers} layers, {found.num_bytes / 1e9:.2f} GB, "
        f"{found.num_bytes / found.seconds / 1e9:.2f} GB/s",
        num_layers=found.num_layers,
        num_bytes=found.num_bytes,
        seconds=round(found.seconds, 1),
    )
