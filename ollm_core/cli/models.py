"""The verbs about models and plugins: `list-models`, `plugins`, `pull`, `import`."""

from __future__ import annotations

import io
import sys
from contextlib import nullcontext, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ollm_core.cli.options import debug_option, json_option, options_of, user_path
from ollm_core.cli.output import print_json, print_table
from ollm_core.memory.sizes import format_size

if TYPE_CHECKING:
    from ollm_core.plugins.registry import PluginInfo


@click.command("list-models")
@options_of("list-models")
@json_option
@debug_option
def list_models(models_dir: str | None, as_json: bool) -> None:
    """Show every model that the installed adapters offer."""
    from ollm_core.checkpoint.hub import is_on_disk, local_path
    from ollm_core.plugins.registry import Registry, limits

    rows = [("ID", "ADAPTER", "DISTRIBUTION", "PARAMETERS", "SIZE", "ON DISK", "UNSUPPORTED")]
    models = []
    for adapter, entry, plugin in Registry.discover().catalog():
        on_disk = is_on_disk(entry.id, models_dir)
        size = format_size(entry.weight_bytes)
        parameters = f"{entry.num_parameters / 1e9:.3g}B"
        missing = limits(adapter)
        without = ", ".join(missing) or "-"
        told = "yes" if on_disk else "no"
        rows.append((entry.id, adapter.name, plugin.distribution, parameters, size, told, without))
        models.append(
            {
                "id": entry.id,
                "adapter": adapter.name,
                "distribution": plugin.distribution,
                "repo": entry.repo,
                "license": entry.license,
                "num_parameters": entry.num_parameters,
                "weight_bytes": entry.weight_bytes,
                "on_disk": on_disk,
                "unsupported": missing,
                "path": str(local_path(entry.id, models_dir)),
            }
        )
    if as_json:
        print_json({"models": models})
    elif not models:
        click.echo("no adapter offers a model; `ollm plugins` shows what is installed")
    else:
        print_table(rows)


@click.command()
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
        brings = [f"adapter {one.name} ({one.adapter_api})" for one in plugin.adapters]
        brings += [f"{KINDS[offer.hook].title} {offer.name}" for offer in plugin.offers]
        status = f"{plugin.status}: {plugin.reason}" if plugin.reason else plugin.status
        rows.append((plugin.name, plugin.distribution, plugin.version, ", ".join(brings), status))
    print_table(rows)
    click.echo(f"this core speaks adapter API {ADAPTER_API}")


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
        "status": plugin.status,
        "reason": plugin.reason,
    }


@click.command()
@click.argument("model_id", metavar="ID")
@options_of("pull")
@click.option("--force", is_flag=True, help="Download again, even if the model is on disk.")
@json_option
@debug_option
def pull(model_id: str, models_dir: str | None, force: bool, as_json: bool) -> None:
    """Download the model ID from the Hugging Face hub. Run it again to resume a download."""
    from ollm_core.checkpoint import hub
    from ollm_core.plugins.registry import Registry

    _, entry = Registry.discover().find(model_id)
    path = hub.pull(entry, models_dir, force=force, progress=sys.stderr.isatty())
    if as_json:
        print_json({"id": entry.id, "path": str(path)})
    else:
        click.echo(path)


@click.command("import")
@click.argument("gguf_file", metavar="FILE.gguf", type=user_path)
@click.option(
    "--out",
    metavar="DIR",
    type=user_path,
    help="Directory for the model.  [default: the file's name, in the models directory]",
)
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32"]),
    default="bfloat16",
    show_default=True,
    help="dtype of the new weights.",
)
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
    from ollm_core.checkpoint.hub import models_root
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
