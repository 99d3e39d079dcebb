"""The verb `completion`, and what a shell is offered for models and files."""

from __future__ import annotations

from contextlib import suppress

import click
from click.shell_completion import CompletionItem, get_completion_class

from ollm_core.errors import OllmError

VARIABLE = "_OLLM_COMPLETE"
"""By which click's scripts ask."""

_FILES = {"bash": "~/.bashrc", "zsh": "~/.zshrc", "fish": "~/.config/fish/completions/ollm.fish"}


@click.command(short_help="Print a script that completes `ollm` in your shell.")
@click.argument("shell", type=click.Choice(list(_FILES)))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print a script for SHELL that completes verbs, flags, their values and names of models.

    \b
    bash  ollm completion bash >> ~/.bashrc
    zsh   ollm completion zsh >> ~/.zshrc
    fish  ollm completion fish > ~/.config/fish/completions/ollm.fish
    """
    script = get_completion_class(shell)
    assert script is not None
    click.echo(script(context.find_root().command, {}, "ollm", VARIABLE).source())


def complete_models(
    context: click.Context, _: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Models on disk, those of the catalogs with their other names, or else directories: click's
    script for bash takes only one kind. No header of a file is read, and nothing is asked of the
    hub.
    """
    from ollm_core.checkpoint.locate import models_on_disk
    from ollm_core.plugins.registry import Registry

    found: dict[str, str] = {}
    with suppress(OllmError):
        registry = Registry.discover()
        for one in models_on_disk(context.params.get("models_dir")):
            known = registry.named(one.name)
            found[known[1].id if known else one.name] = "on disk"
        for _adapter, entry, _plugin in registry.catalog():
            names = (entry.id, *entry.aliases)
            found |= {name: found.get(name, entry.repo) for name in names}
    begun = [
        CompletionItem(name, help=text)
        for name, text in found.items()
        if name.startswith(incomplete)
    ]
    return begun or [CompletionItem(incomplete, type="dir")]


model_argument = click.argument("model", metavar="MODEL", shell_complete=complete_models)
"""Of verbs that open a model, or fetch one."""
