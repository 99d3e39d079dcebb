"""For every capability, a use that needs it: what an adapter that declares it unsupported must
refuse.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from ollm_conformance.subject import Subject, generate


def _run(subject: Subject, num_rows: int = 1, **options: Any) -> None:
    with subject.open(**options) as model:
        model(input_ids=subject.prompt(80).reshape(num_rows, -1))


def _truncate(subject: Subject) -> None:
    with subject.open() as model:
        cache = model.new_cache()
        model(input_ids=subject.prompt(80)[None], past_key_values=cache)
        cache.crop(-5)


def _draft(subject: Subject) -> None:
    with subject.open() as model:
        generate(model, subject.prompt(80)[None], 4, prompt_lookup_num_tokens=3)


ASKS: Mapping[str, Callable[[Subject], None]] = MappingProxyType(
    {
        "batch": lambda subject: _run(subject, num_rows=2),
        "chunked-prefill": lambda subject: _run(subject, chunk_size=16),
        "kv-device": lambda subject: _run(subject, kv="device"),
        "kv-host": lambda subject: _run(subject, kv="host"),
        "kv-disk": lambda subject: _run(subject, kv="disk"),
        "blockwise-attention": lambda subject: _run(subject, attention="blockwise"),
        "truncate": _truncate,
        "drafts": _draft,
    }
)
"""Capability to a use of it."""
