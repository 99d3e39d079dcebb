"""The verbs about models and plugins: `plugins`, `pull`, `import`."""

from __future__ import annotations

import io
import os
import sys
from contextlib import nullcontext, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ollm_core.checkpoint.locate import is_repository, may_be_id
from ollm_core.cli.completion import model_argument
from ollm_core.cli.options import debug_option, dtype_option, json_option, options_of, user_path
from ollm_core.cli.output import print_json, print_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ollm_core.contracts.adapter import ModelAdapter
    from ollm_core.plugins.registry import PluginInfo


@click.command(short_help="List installed plugins, and why one failed to load.")
@json_option
@debug_option
def plugins(as_json: bool) -> None:
    """Show the installed plugins, what each provides, and why one failed to load."""
    from ollm_core.contracts.adapter import ADAPTER_API
    from ollm_core.plugins.loader import KINDS
    from ollm_core.plugins.registry import Registry

    found = Registry.discover().plugins
    if as_json:
        print_json({"core_adapter_api": ADAPTER_API, "plugins": [_fields(one) for one in found]})
        return
    rows = [("PLUGIN", "DISTRIBUTION", "VERSION", "PROVIDES", "STATUS")]
    for plugin in found:
        brings = _together("adapter", [_spoken(one) for one in plugin.adapters])
        for hook, kind in KINDS.items():
            offered = [offer.name for offer in plugin.offers if offer.hook == hook]
            brings += _together(kind.title, offered)
        brings += [f"catalog of {len(plugin.models)} models"] if plugin.models else []
        status = f"{plugin.status}: {plugin.reason}" if plugin.reason else plugin.status
        rows.append((plugin.name, plugin.distribution, plugin.version, "; ".join(brings), status))
    print_table(rows)
    click.echo(f"this core speaks adapter API {ADAPTER_API}")


def _spoken(adapter: ModelAdapter) -> str:
    """Its name, and the adapter API that it speaks where that is not this core's."""
    from ollm_core.contracts.adapter import ADAPTER_API

    speaks = adapter.adapter_api
    return adapter.name if speaks == ADAPTER_API else f"{adapter.name} (API {speaks})"


def _together(title: str, names: Sequence[str]) -> list[str]:
    """Things of one kind in words, or nothing."""
    return [f"{title}{'s' * (len(names) > 1)} {', '.join(names)}"] if names else []


def _fields(plugin: PluginInfo) -> dict[str, object]:
    """One plugin as JSON shows it."""
    from ollm_core.plugins.loader import KINDS

    return {
        "name": plugin.name,
        "distribution": plugin.distribution,
        "version": plugin.version,
        "adapters": [
            {
                "name": adapter.name,
                "adapter_api": adapter.adapter_api,
                "model_types": list(adapter.model_types),
            }
            for adapter in plugin.adapters
        ],
        **{
            kind.field: [offer.name for offer in plugin.offers if offer.hook == hook]
            for hook, kind in KINDS.items()
        },
        "num_models": len(plugin.models),
        "status": plugin.status,
        "reason": plugin.reason,
    }


@click.command(short_help="Download a model from the Hugging Face hub.")
@model_argument
@options_of("pull")
@click.option("--force", is_flag=True, help="Download again, even if the model is on disk.")
@json_option
@debug_option
def pull(model: str, models_dir: str | None, force: bool, as_json: bool) -> None:
    """Download MODEL, an id or a hub repository (owner/name), from the Hugging Face hub.

    Fetches config, tokenizer, chat template and safetensors weights, and nothing else. After an
    interruption, run it again: files that are whole are kept. A model that no installed adapter
    opens is refused before its weights are fetched.
    """
    model_id, path = fetch(model, models_dir, force=force)
    if as_json:
        print_json({"id": model_id, "path": str(path)})
    else:
        click.echo(path)


def check_known(model: str, models_dir: str | None, *, here: bool) -> None:
    """Say at once, before torch is loaded, that there is no such model, or, where it must be
    `here`, that it is not on disk. Raises InputError, UnknownModelError.
    """
    from ollm_core.checkpoint.locate import has_config, locate, resolve
    from ollm_core.plugins.registry import Registry

    registry = Registry.discover()
    is_path = "/" in model or os.path.exists(model) or model.endswith(".json")
    if may_be_id(model) and locate(model, registry, models_dir, has_config):
        return  # whether it is whole, who opens it says
    if here:
        resolve(model, registry, models_dir)
    elif not is_path:
        registry.find(model)


def fetch_if(model: str, models_dir: str | None, pull: bool) -> None:
    """Download the model if asked to, and refuse one that nobody knows."""
    if pull and not Path(model).is_dir():
        fetch(model, models_dir)
    check_known(model, models_dir, here=True)


def fetch(model: str, models_dir: str | None, *, force: bool = False) -> tuple[str, Path]:
    """Pull a model by its id, an alias or its hub repository; -> its id and its directory."""
    from ollm_core.checkpoint import hub
    from ollm_core.contracts.model import CatalogEntry
    from ollm_core.plugins.registry import Registry

    registry = Registry.discover()
    if is_repository(model) and not registry.named(model):
        entry = CatalogEntry(model, model, 0, 0, {})
    else:
        _, entry = registry.find(model)
    path = hub.pull(
        entry,
        models_dir,
        force=force,
        progress=sys.stderr.isatty(),
        check=lambda config: registry.check_opens(config, entry.repo),
    )
    return entry.id, path


@click.command("import")
@click.argument("gguf_file", metavar="FILE.gguf", type=user_path)
@click.option(
    "--out",
    metavar="DIR",
    type=user_path,
    help="Directory for the model.  [default: the file's name, in the models directory]",
)
@dtype_option("dtype of the new weights.")
@options_of("import")
@click.option("--force", is_flag=True, help="If the directory exists, rename it first.")
@json_option
@debug_option
@click.pass_context
def import_(
    context: click.Context,
    gguf_file: Path,
    out: Path | None,
    dtype: str,
    models_dir: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Convert a GGUF file to a safetensors model. Quantised weights are dequantised."""
    from ollm_core.checkpoint.locate import models_root
    from ollm_core.convert.gguf.importer import import_gguf

    out = out or models_root(models_dir) / gguf_file.stem
    show = sys.stderr.isatty() or context.ensure_object(dict).get("debug")
    with nullcontext() if show else redirect_stderr(io.StringIO()):  # the libraries' own bars
        aside = import_gguf(gguf_file, out, dtype, force=force)
    if aside is not None:
        click.echo(f"renamed {out}, which existed, to {aside}", err=True)
    if as_json:
        print_json({"path": str(out), "dtype": dtype, "moved": str(aside) if aside else None})
    else:
        click.echo(out)
