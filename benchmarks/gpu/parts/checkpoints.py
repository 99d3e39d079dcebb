"""Checkpoints of true shapes with random weights: as many layers as time and disk allow."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.experts.full_shape import (
    FAMILIES,
    Family,
    Stored,
    config_of,
    files_of,
    random_tensors,
    write_description,
)
from benchmarks.gpu.parts.work import Work
from benchmarks.tools.aligned import save_aligned
from ollm_core.contracts.tensors import DTYPE_BYTES
from ollm_core.plugins.registry import Registry

LLAMA = Family("llama3-8B-chat")
_WRITERS = 4  # one thread copies into the page cache at a fraction of the disk's rate
_SPARE_BYTES = 4_000_000_000


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One that is on the disk."""

    path: Path
    num_layers: int
    num_bytes: int
    """Of its tensors."""
    seconds: float
    """That writing it took; 0 if it was there."""

    @property
    def layer_bytes(self) -> int:
        """Of the last layer's file."""
        return (self.path / f"part-{self.num_layers - 1}.safetensors").stat().st_size

    @property
    def embedding_bytes(self) -> int:
        """Of the embedding's file: only rows of it are read."""
        return sum(file.stat().st_size for file in self.path.glob("*embed_tokens*.safetensors"))


def true_config(family: Family, num_layers: int | None, *, small: bool) -> dict[str, Any]:
    """The published config.json with `num_layers` layers, all by default; with `small` that of the
    adapter's tiny model, whole.
    """
    adapter, entry = Registry.discover().find(family.model_id)
    if small:
        config = {**adapter.tiny_config(), "dtype": "bfloat16"}
    else:
        config = config_of(family, num_layers or int(entry.config["num_hidden_layers"]))
    config.pop("torch_dtype", None)
    return config


def llama(work: Work, part_of_disk: float = 0.45) -> Checkpoint:
    """Llama-3-8B, or as much of it as fits; written by the first who asks."""
    return written(work, "llama3-8b", LLAMA, None, part_of_disk)


def experts(work: Work, family: str, num_layers: int) -> Checkpoint:
    """A few layers of a mixture of experts of `FAMILIES`."""
    return written(work, family, FAMILIES[family], num_layers, 0.8)


def written(
    work: Work, name: str, family: Family, num_layers: int | None, part_of_disk: float
) -> Checkpoint:
    """The checkpoint `name`, with at most `num_layers` (default: all) of the family's layers, and
    no more than that part of the disk's free room takes. Where time runs out it has fewer.

    Raises OSError if not even one layer has room.
    """
    path = work.directory / name
    if not path.is_dir():
        partial = work.path(f"{name}.partial")
        started = time.monotonic()
        config = true_config(family, num_layers, small=work.small)
        room = shutil.disk_usage(partial).free
        room = room if work.small else int((room - _SPARE_BYTES) * part_of_disk)
        files = _that_fit(files_of(config), room)
        done = _write(files, partial, work)
        _describe(partial, config, family, {file: files[file] for file in done})
        (partial / "seconds").write_text(str(time.monotonic() - started))
        partial.rename(path)
    return _there(path)


def cut(work: Work, whole: Checkpoint, family: Family, num_layers: int) -> Checkpoint:
    """The first layers of a checkpoint, as links to its files."""
    path = work.directory / f"{whole.path.name}-{num_layers}"
    if num_layers >= whole.num_layers:
        return whole
    if not path.is_dir():
        path.mkdir()
        index = json.loads((whole.path / "model.safetensors.index.json").read_text())
        files: dict[str, list[str]] = {}
        for name, file in index["weight_map"].items():
            if (_layer_of(file) or 0) < num_layers:
                files.setdefault(file, []).append(name)
        for file in files:
            os.link(whole.path / file, path / file)
        config = json.loads((whole.path / "config.json").read_text())
        write_description(path, _shortened(config, family, num_layers), files)
    return _there(path)


def remove(checkpoint: Checkpoint) -> None:
    """Give the disk its room back."""
    shutil.rmtree(checkpoint.path, ignore_errors=True)


def _there(path: Path) -> Checkpoint:
    config = json.loads((path / "config.json").read_text())
    num_bytes = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    took = path / "seconds"
    seconds = float(took.read_text()) if took.is_file() else 0.0
    return Checkpoint(path, int(config["num_hidden_layers"]), num_bytes, seconds)


def _that_fit(files: Mapping[str, Mapping[str, Stored]], room: int) -> dict[str, dict[str, Stored]]:
    """What is no layer, and then as many layers as `room` has bytes for."""
    taken, kept = 0, {}
    for file in sorted(files, key=lambda file: -1 if (i := _layer_of(file)) is None else i):
        taken += sum(_bytes_of(form) for form in files[file].values())
        if taken > room and (_layer_of(file) or 0) > 0:
            break
        kept[file] = dict(files[file])
        if taken > room and _layer_of(file) == 0:
            raise OSError(f"a layer wants {taken} bytes of disk, {room} may be used")
    return kept


def _write(files: Mapping[str, Mapping[str, Stored]], out: Path, work: Work) -> list[str]:
    """The files that were written before half of the time was up: the first ones, without a gap."""
    ends = time.time() + work.seconds_left / 2

    def write(number: int, file: str) -> str:
        if time.time() > ends and (_layer_of(file) or 0) > 0:
            return ""
        generator = torch.Generator(work.device).manual_seed(number)
        save_aligned(random_tensors(files[file], generator), out / file)
        return file

    with ThreadPoolExecutor(_WRITERS) as pool:
        found = list(pool.map(write, range(len(files)), files))
    return found[: found.index("")] if "" in found else found


def _describe(
    out: Path, config: dict[str, Any], family: Family, files: Mapping[str, Mapping[str, Stored]]
) -> None:
    num_layers = sum(_layer_of(file) is not None for file in files)
    write_description(out, _shortened(config, family, num_layers), files)
    for stray in {path.name for path in out.glob("*.safetensors")} - files.keys():
        (out / stray).unlink()


def _shortened(config: dict[str, Any], family: Family, num_layers: int) -> dict[str, Any]:
    per_layer = {key: config[key][:num_layers] for key in family.per_layer if config.get(key)}
    return {**config, **per_layer, "num_hidden_layers": num_layers}


def _layer_of(file: str) -> int | None:
    """Which layer's file it is."""
    number = file.removeprefix("part-").removesuffix(".safetensors")
    return int(number) if number.isdecimal() else None


def _bytes_of(form: Stored) -> int:
    dtype, shape = form
    return DTYPE_BYTES[dtype] * torch.Size(shape).numel()
