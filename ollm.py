"""oLLM: run a language model that is larger than your memory, exactly, with weights streamed from
the SSD.

    import ollm
    with ollm.load("llama3-8B-chat", device_memory="8GB") as model:
        ids = model.tokenizer("The capital of France is", return_tensors="pt").input_ids
        print(model.tokenizer.decode(model.generate(ids, max_new_tokens=20)[0]))

Names are imported when they are first used, so that `import ollm` does not load torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ollm_core import __version__

if TYPE_CHECKING:
    from transformers import TextStreamer

    from ollm_core.inference import AutoInference, Inference, file_get_contents
    from ollm_core.loading import load
    from ollm_core.planner import plan
    from ollm_core.plans import Plan

_HOMES = {
    "load": "ollm_core.loading",
    "plan": "ollm_core.planner",
    "Plan": "ollm_core.plans",
    "Inference": "ollm_core.inference",
    "AutoInference": "ollm_core.inference",
    "file_get_contents": "ollm_core.inference",
    "TextStreamer": "transformers",
}

__all__ = [
    "AutoInference",
    "Inference",
    "Plan",
    "TextStreamer",
    "__version__",
    "file_get_contents",
    "load",
    "plan",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'ollm' has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)
