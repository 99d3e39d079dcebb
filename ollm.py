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
import os
import signal
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import TextStreamer

    from ollm_core import __version__
    from ollm_core.api import load
    from ollm_core.checkpoint.locate import models_on_disk
    from ollm_core.compat import AutoInference, Inference, file_get_contents
    from ollm_core.contracts.progress import Progress, Stats
    from ollm_core.documents.reading import read_document
    from ollm_core.errors import OllmError
    from ollm_core.llm import LLM
    from ollm_core.planning.plan import Plan
    from ollm_core.planning.planner import plan
    from ollm_core.serving.request import SamplingParams

_HOMES = {
    "load": "ollm_core.api",
    "LLM": "ollm_core.llm",
    "SamplingParams": "ollm_core.serving.request",
    "models_on_disk": "ollm_core.checkpoint.locate",
    "plan": "ollm_core.planning.planner",
    "Plan": "ollm_core.planning.plan",
    "OllmError": "ollm_core.errors",
    "Progress": "ollm_core.contracts.progress",
    "Stats": "ollm_core.contracts.progress",
    "Inference": "ollm_core.compat",
    "AutoInference": "ollm_core.compat",
    "file_get_contents": "ollm_core.compat",
    "read_document": "ollm_core.documents.reading",
    "TextStreamer": "transformers",
    "__version__": "ollm_core",
}
_SIGNALS = {
    signal.SIGINT: "interrupted",
    signal.SIGTERM: "terminated",
    signal.SIGHUP: "terminated",
}

__all__ = [
    "LLM",
    "AutoInference",
    "Inference",
    "OllmError",
    "Plan",
    "Progress",
    "SamplingParams",
    "Stats",
    "TextStreamer",
    "__version__",
    "file_get_contents",
    "load",
    "models_on_disk",
    "plan",
    "read_document",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'ollm' has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


def main() -> None:
    """The command `ollm`. A signal while it is being imported ends it at once: there is nothing to
    close yet. After it, signals are ignored, and Python ends in peace.
    """

    def leave(number: int, _: object) -> None:
        os.write(2, f"error: {_SIGNALS[signal.Signals(number)]}\n".encode())
        os._exit(128 + number)

    taken = [number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    for number in taken:
        signal.signal(number, leave)
    try:
        from ollm_core.cli.main import main

        main()
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_IGN)


if __name__ == "__main__":
    main()
