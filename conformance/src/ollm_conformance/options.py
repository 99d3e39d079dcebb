"""How a model may be opened: values of every option of `ollm.load`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ollm_core.testing import Profile

OF_THE_SUITE = frozenset({"device", "registry", "models_dir", "draft_model", "kv_dir"})
"""Options that a check gives itself: they say what is opened, and where."""


def load_values(
    tiers: Sequence[str], *, chunked: bool, drafts: bool
) -> Mapping[str, Sequence[Any]]:
    """Values of each option of `load` on a CPU, of a family that has these KV tiers, and prompts in
    chunks if `chunked`, and drafts if `drafts`. None of them changes a bit of the logits but dtype
    and chunks. A profile is to be made for each model.
    """
    return dict.fromkeys(OF_THE_SUITE, (None,)) | {
        "dtype": ("float32", "bfloat16"),
        "device_memory": ("1GB", 1 << 30, "900MiB"),
        "host_memory": ("1GB", 1 << 29),
        "device_layers": (None, 0, 1),
        "host_layers": (None,),  # beside a GPU
        "kv": tiers,
        "precision": ("exact",),
        "attention": ("exact", "auto"),
        "chunk_size": (7, 33, 64, 100, 200) if chunked else (None,),
        "keep_kv": (False, True),
        "kv_budget": (None,),
        "reader": ("auto", "mmap", "direct"),
        "draft": ("none", "lookup") if drafts else ("none",),
        "num_draft_tokens": (None,),
        "trust_remote_code": (False, True),
        "on_progress": (None, lambda _: None),
        "profile": (None, Profile),
    }
