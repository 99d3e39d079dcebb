"""What is not installed here, and what it would bring."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Extra:
    """Packages that oLLM uses where they are there."""

    modules: tuple[str, ...]
    gain: str
    needs_cuda: bool = False

    @property
    def absent(self) -> str:
        """The first of its modules that is not installed, or nothing."""
        return next((one for one in self.modules if importlib.util.find_spec(one) is None), "")


EXTRAS = {
    "serve": Extra(
        ("starlette", "uvicorn", "h11", "python_multipart"),
        "`ollm serve`: OpenAI's and Ollama's clients, and a page",
    ),
    "structured": Extra(("llguidance",), "answers of a server that follow a JSON schema"),
    "documents": Extra(("pypdf",), "PDF files as documents"),
    "cpu": Extra(
        ("numba",), "faster bfloat16 on a CPU where a few tokens run at once: drafts, many texts"
    ),
    "gguf": Extra(("gguf", "accelerate"), "`ollm import` of GGUF files"),
    "compressed": Extra(
        ("zstandard",), "`ollm convert`: a third less to read from a slow disk, losslessly"
    ),
    "plot": Extra(("matplotlib",), "`ollm plan --plot FILE.png`"),
    "ray": Extra(("ray",), "`ollm batch --ray`: batches on a cluster"),
    "flash-attn": Extra(("flash_attn",), "attention of long prompts by flash-attn, on a GPU", True),
    "kvikio-cu12": Extra(("kvikio",), "weights read from the disk into a GPU's memory", True),
    "kvikio-cu13": Extra(("kvikio",), "the same with CUDA 13", True),
}
"""By the name of the extra in `pip install 'ollm-core[NAME]'`."""


@dataclass(frozen=True, slots=True)
class Missing:
    """One thing that this machine, or this Python, lacks."""

    name: str
    gain: str
    """What there would be with it."""
    hint: str
    """How to get it."""


def missing(device: str, readers: Sequence[str], num_adapters: int) -> list[Missing]:
    """All of them, for a `device` as torch names it, the reading engines that work here, and the
    number of adapters that are loaded.
    """
    has_cuda = device.startswith("cuda")
    found = []
    if not num_adapters:
        found.append(
            Missing(
                "adapters",
                "any model at all",
                "pip install ollm-adapter-llama, or ollm-adapter-transformers for most families",
            )
        )
    elif importlib.util.find_spec("ollm_adapter_transformers") is None:
        found.append(
            Missing(
                "ollm-adapter-transformers",
                "models of the families that no other adapter opens",
                "pip install ollm-adapter-transformers",
            )
        )
    if not has_cuda:
        found.append(
            Missing("GPU", "less time for long prompts", "one with CUDA, and torch for it")
        )
    if "direct" not in readers:
        found.append(
            Missing(
                "direct reads",
                "weights read past the page cache, with less work for the CPU",
                "keep models on a file system with O_DIRECT, as ext4 and XFS are",
            )
        )
    found += [
        Missing(name, extra.gain, f"pip install 'ollm-core[{name}]'")
        for name, extra in EXTRAS.items()
        if extra.absent and (has_cuda or not extra.needs_cuda)
    ]
    return found
