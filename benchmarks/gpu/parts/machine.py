"""What this is measured on."""

from __future__ import annotations

import shutil
import subprocess

import torch

from benchmarks.gpu.parts.work import Tell, Work
from benchmarks.tools.measure import environment
from ollm_core.plugins.registry import Registry


def run(work: Work, tell: Tell, _: str = "") -> None:
    """One finding, whose fields go to the top of the record. Raises RuntimeError without a card."""
    about = environment(work.directory)
    free = shutil.disk_usage(work.directory).free
    plugins = Registry.discover().plugins
    fields = {
        **about,
        "card": None,
        "disk_free_bytes": free,
        "plugins": [f"{plugin}: {plugin.status} {plugin.reason}".strip() for plugin in plugins],
        "threads": torch.get_num_threads(),
    }
    name = "cpu"
    if work.on_card:
        if not torch.cuda.is_available():
            raise RuntimeError("no CUDA device is here")
        card = torch.cuda.get_device_properties(work.device)
        name = card.name
        fields["card"] = {
            "name": card.name,
            "memory_bytes": card.total_memory,
            "free_bytes": torch.cuda.mem_get_info(work.device)[0],
            "capability": f"{card.major}.{card.minor}",
            "multiprocessors": card.multi_processor_count,
            "cuda": torch.version.cuda,
            "driver": _driver(),
            "bf16": torch.cuda.is_bf16_supported(),
            "allow_tf32": torch.backends.cuda.matmul.allow_tf32,
        }
    versions = about["versions"]
    tell(
        name,
        f"torch {versions['torch']}, transformers {versions['transformers']}, "
        f"{free / 1e9:.0f} GB of disk free",
        **fields,
    )


def _driver() -> str:
    """Its version, where nvidia-smi tells."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "not told"
    return done.stdout.strip().partition("\n")[0] or "not told"
