"""What the library lets one choose by name, each timed on the same layers: attention, and reading
engines. New ones come in by themselves.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from typing import Any

from benchmarks.gpu.parts.checkpoints import LLAMA, cut, llama
from benchmarks.gpu.parts.runs import disk_limit, fault_of, measured, share, told_of
from benchmarks.gpu.parts.work import OutOfTime, Tell, Work
from ollm_core import OllmError
from ollm_core.attention.select import ATTENTIONS
from ollm_core.plugins.loader import KINDS
from ollm_core.plugins.registry import Registry

_LAYERS = 6
_ENGINES = "ollm_reading_engines"


def run(work: Work, tell: Tell, _: str = "") -> None:
    """A finding for each choice; one that this machine cannot have says why. Raises OutOfTime, and
    RuntimeError at the end if some have failed otherwise.
    """
    checkpoint = cut(work, llama(work), LLAMA, _LAYERS)
    limit = disk_limit(checkpoint)
    num_tokens, num_new = (24, 3) if work.small else (8192, 8)
    failed = []
    for name, options, streamed in choices():
        if work.seconds_left < 6:
            raise OutOfTime(f"{name} was not measured, nor what comes after")
        memory = {"device_memory": "1GB", "host_memory": "1GB"} if work.small else {}
        length = 16 if streamed else num_tokens
        try:
            found = measured(
                work, checkpoint, length, num_new, warming=True, **{**options, **memory}
            )
        except OllmError as error:
            tell(name, f"not here: {error}")
            continue
        except Exception as error:  # noqa: BLE001 (the others are tried all the same)
            failed.append(f"{name}: {type(error).__name__}: {error}")
            tell(name, failed[-1], traceback=traceback.format_exc())
            continue
        told = told_of(found)
        if streamed:
            found["disk_limit_gb_s"], found["share_of_disk"] = round(limit, 3), share(found, limit)
            told += f"; {found['share_of_disk']:.0%} of the disk's limit"
        tell(name, told, fault=fault_of(found), **found)
    if failed:
        raise RuntimeError("; ".join(failed))


def choices() -> Iterator[tuple[str, dict[str, Any], bool]]:
    """Name, options of `ollm.load`, and whether weights are streamed for it."""
    for name in ATTENTIONS:
        yield f"attention {name}", {"attention": name, "kv": "device"}, False
    engines = [name for name in KINDS[_ENGINES].built_in if name != "auto"]
    for name in (*engines, *Registry.discover().offers(_ENGINES)):
        options = {"reader": name, "kv": "device", "attention": "exact", "device_layers": 0}
        yield f"reader {name}", {**options, "host_memory": "3GB"}, True
