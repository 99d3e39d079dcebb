"""The verb `list-models`: what can be named, what is on disk anywhere, and what fits here."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ollm_core.cli.options import debug_option, json_option, options_of
from ollm_core.cli.output import print_json, print_table
from ollm_core.errors import OllmError, UnsupportedError
from ollm_core.memory.sizes import format_size

if TYPE_CHECKING:
    from ollm_core.checkpoint.fit import Machine
    from ollm_core.checkpoint.locate import OnDisk
    from ollm_core.contracts.adapter import ModelAdapter
    from ollm_core.contracts.model import CatalogEntry, Config
    from ollm_core.plugins.registry import Registry


@dataclass(slots=True)
class _Row:
    """One model: of a catalog, on disk, or both."""

    id: str
    adapter: ModelAdapter | None
    config: Config
    weight_bytes: int
    entry: CatalogEntry | None = None
    distribution: str = ""
    places: list[OnDisk] = field(default_factory=list)
    fits: str = ""


@click.command("list-models", short_help="List known models, and which of them fit here.")
@click.argument("word", required=False)
@options_of("list-models")
@json_option
@debug_option
def list_models(word: str | None, models_dir: str | None, as_json: bool) -> None:
    """Show the models that can be named, those on disk first, and whether they fit this machine.

    With WORD only those that have it in a name. Any other model of the Hugging Face hub is named
    by its repository, owner/name.
    """
    from ollm_core.checkpoint.fit import Machine
    from ollm_core.checkpoint.locate import models_root
    from ollm_core.plugins.registry import Registry

    root = models_root(models_dir)
    registry = Registry.discover()
    machine = Machine.here(_free_disk(root))
    rows = [row for row in _rows(registry, models_dir) if word is None or _has(row, word)]
    for row in rows:
        row.fits = _fits(row, machine)
    if word is not None and not rows:
        registry.find(word)  # says what may be meant
    if as_json:
        print_json({"models": [_fields(row, root) for row in rows]})
    elif not rows:
        click.echo("no adapter offers a model; `ollm plugins` shows what is installed")
    else:
        print_table([("MODEL", "ALSO", f"{'SIZE':>7}", "ON DISK", "HERE"), *map(_cells, rows)])
        click.echo(_foot(machine))


def _rows(registry: Registry, models_dir: str | None) -> list[_Row]:
    """Those on disk first, each part by name."""
    from ollm_core.checkpoint.locate import HERE, models_on_disk
    from ollm_core.checkpoint.safetensors import read_config

    rows = {
        entry.id: _Row(
            entry.id,
            adapter,
            entry.config,
            entry.weight_bytes,
            entry,
            plugin.distribution,
        )
        for adapter, entry, plugin in registry.catalog()
    }
    for found in models_on_disk(models_dir):
        known = registry.named(found.name.removeprefix(f"{HERE}/"))
        row = rows.get(known[1].id) if known else rows.get(found.name)
        if row is None:
            row = rows[found.name] = _Row(found.name, None, {}, found.weight_bytes)
        row.places.append(found)
        if len(row.places) == 1:  # what a run opens: its own config is what counts
            with suppress(OllmError):
                row.config = read_config(found.directory)
                row.adapter = registry.claimant(row.config)
            row.weight_bytes = found.weight_bytes
    return sorted(rows.values(), key=lambda row: (not row.places, _by_size(row.id)))


def _by_size(name: str) -> list[tuple[str, float]]:
    """Sorts names by their text, and by the numbers in it: `360M` before `8B` before `14B`."""
    parts = re.findall(r"([^0-9]*)([0-9]+(?:\.[0-9]+)?)?(m(?![a-z]))?", name.casefold())
    return [
        (text, float(number or 0) / (1000 if millions else 1)) for text, number, millions in parts
    ]


def _has(row: _Row, word: str) -> bool:
    return any(word.casefold() in name.casefold() for name in _names(row))


def _names(row: _Row) -> Iterator[str]:
    yield row.id
    if row.entry:
        yield from (*row.entry.aliases, row.entry.repo)


def _fits(row: _Row, machine: Machine) -> str:
    from ollm_core.plugins.registry import check_quantization

    if row.config:
        if row.adapter is None:
            return "no adapter"
        try:
            check_quantization(row.adapter, row.config, "")
        except UnsupportedError:
            return "quantised"
    return machine.fits(row.config, row.weight_bytes, on_disk=bool(row.places))


def _cells(row: _Row) -> tuple[str, ...]:
    also = row.entry.aliases[0] if row.entry and row.entry.aliases else "-"
    size = format_size(row.weight_bytes) if row.weight_bytes else "?"
    place = row.places[0].place if row.places else "-"
    return row.id, also, f"{size:>7}", place, "?" if row.fits == "unknown" else row.fits


def _fields(row: _Row, root: Path) -> dict[str, object]:
    """One model as JSON shows it."""
    from ollm_core.plugins.registry import limits

    entry, first = row.entry, row.places[0] if row.places else None
    return {
        "id": row.id,
        "aliases": list(entry.aliases) if entry else [],
        "adapter": row.adapter.name if row.adapter else None,
        "distribution": row.distribution,
        "repo": entry.repo if entry else (first.name if first and "/" in first.name else None),
        "license": entry.license if entry else "",
        "num_parameters": entry.num_parameters if entry else 0,
        "weight_bytes": row.weight_bytes,
        "config_known": bool(row.config),
        "on_disk": bool(row.places),
        "places": [{"place": one.place, "path": str(one.directory)} for one in row.places],
        "fits": row.fits,
        "unsupported": limits(row.adapter) if row.adapter else {},
        "path": str(first.directory if first else root / row.id),
    }


def _foot(machine: Machine) -> str:
    memory = format_size(sum(machine.budgets))
    device, disk = "a GPU" if machine.has_gpu else "the CPU", format_size(machine.free_disk)
    return (
        f"\nHERE is an estimate for {device}, {memory} of memory, {disk} of free disk:\n"
        "weights stay in memory, or are streamed from disk at each pass.\n"
        "Exact, and also where it says ?, is: ollm plan MODEL.\n"
        "For any other model of the hub: ollm pull OWNER/NAME."
    )


def _free_disk(root: Path) -> int:
    """Bytes free where models would be kept."""
    there: Iterable[Path] = takewhile(lambda one: not one.exists(), (root, *root.parents))
    missing = len(list(there))
    with suppress(OSError):
        return shutil.disk_usage((root, *root.parents)[missing]).free
    return 0
