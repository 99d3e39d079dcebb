"""The verb `plan`: predicts the memory and the time of a run, without weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ollm_core.cli.completion import model_argument
from ollm_core.cli.models import check_known
from ollm_core.cli.options import debug_option, json_option, options_of
from ollm_core.cli.output import format_time, print_json
from ollm_core.cli.picture import check_path, save
from ollm_core.cli.timeline import draw
from ollm_core.errors import DoesNotFitError
from ollm_core.memory.kinds import label_of
from ollm_core.memory.sizes import format_size

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ollm_core.planning.plan import Plan

_TERMINAL = "-"
_COLUMN = 12


@click.command(short_help="Predict the memory and the time of a run.")
@model_argument
@options_of("plan")
@click.option(
    "--plot",
    metavar="[FILE.png]",
    is_flag=False,
    flag_value=_TERMINAL,
    help="Also draw the memory held during the run: in the terminal, or into a file.",
)
@json_option
@debug_option
def plan(model: str, as_json: bool, plot: str | None, **options: Any) -> None:
    """Predict the memory and the time that a run of MODEL needs, without running it.

    MODEL is an id, a hub repository (owner/name), a directory, or a lone config.json. You need
    neither its weights nor the device. Of a repository that is not on disk, config.json is
    fetched.
    """
    picture = Path(plot) if plot not in (None, _TERMINAL) else None
    if picture:
        check_path(picture)
    check_known(model, options["models_dir"], here=False)
    from ollm_core.planning import planner

    found = planner.plan(model, **options)
    if as_json:
        print_json(found.fields())
    if not found.fits:
        raise DoesNotFitError(found.reason, hint=found.hint)
    if not as_json:
        click.echo(_text(found, options["device_layers"], options["host_layers"]))
    if picture:
        save(found, picture)
        click.echo(f"drawn in {picture}", err=True)
    elif plot:
        width = 80 if as_json else shutil.get_terminal_size().columns
        drawn = draw(found.moments, found.device_memory, width)
        click.echo(drawn if as_json else f"\n{drawn}", err=as_json)


def _text(plan: Plan, device_layers: int | None = None, host_layers: int | None = None) -> str:
    """The plan as a table; of layers where a number was asked for."""
    place = plan.placement
    lines = [
        ("model", f"{plan.model}, {format_size(plan.weight_bytes)}, {plan.dtype}"),
        ("based on", plan.planned_from),
        (
            "run",
            f"{plan.batch} x {plan.context - plan.max_new_tokens} prompt tokens and "
            f"{plan.max_new_tokens} new tokens on {plan.device}",
        ),
        (
            "prefill",
            f"{format_time(plan.prefill_seconds)}, bound by {_limit(plan.prefill_limited_by)}",
        ),
        (
            "decode",
            f"{plan.tokens_per_second:.3g} tokens/s, bound by {_limit(plan.limited_by)}; "
            f"{format_size(plan.bytes_read_per_token)} read per token",
        ),
        ("placement", _layers(place)),
    ]
    for name, asked in (("device", device_layers), ("host", host_layers)):
        if asked is not None:
            kept = place[f"{name}_layers"]
            lines.append(("", f"{kept} layers on the {name}, your limit is {asked}"))
    if "experts" in place:
        lines.append(
            (
                "experts",
                f"{place['device_experts']} of {place['experts']} resident on the device, "
                f"{place['host_experts']} on the host",
            )
        )
    lines += [
        ("KV cache", f"{format_size(plan.kv_bytes)} on {place['kv']}"),
        ("prompt", f"chunks of {place['chunk_size']} tokens, {place['attention']} attention"),
    ]
    text = [f"{name:<{_COLUMN}}{value}" for name, value in lines]
    text += ["", *_memory("device", plan.device_peak_bytes, plan.device_memory, plan.device_bytes)]
    text += _memory("host", plan.host_peak_bytes, plan.host_memory, plan.host_bytes)
    text += [
        "",
        f"{'minimum':<{_COLUMN}}{format_size(plan.smallest_device_bytes)} device, "
        f"{format_size(plan.smallest_host_bytes)} host",
        f"{'max context':<{_COLUMN}}{plan.largest_context} tokens with these limits",
    ]
    for i, rates in enumerate(_rates(plan)):
        text.append(f"{'' if i else 'rates':<{_COLUMN}}{rates}")
    for i, change in enumerate(plan.changes):
        text.append(
            f"{'' if i else 'better':<{_COLUMN}}{change.option}: prefill "
            f"{format_time(change.prefill_seconds)}, {change.tokens_per_second:.3g} tokens/s"
        )
    return "\n".join(text)


def _layers(place: Mapping[str, Any]) -> str:
    """Where the units of a pass are while tokens are made."""
    units = place["layers"] + place["head_parts"]
    kept = f"{place['device_units']} of {units} units on the device"
    if place["host_units"]:
        kept += f", {place['host_units']} in host memory"
    if place["streamed_units"]:
        size = format_size(place["ring_buffer_bytes"])
        kept += (
            f", {place['streamed_units']} streamed through {place['ring_buffers']} buffers "
            f"of {size}"
        )
    return kept + f" ({place['layers']} layers, head in {place['head_parts']} parts)"


def _memory(name: str, peak: int, limit: int, parts: Mapping[str, int]) -> list[str]:
    """The peak of one memory and what it is made of, the largest first."""
    text = [f"{name:<{_COLUMN}}peak {format_size(peak)} / limit {format_size(limit)}"]
    for kind, num_bytes in sorted(parts.items(), key=lambda part: -part[1]):
        text.append(f"{'':<{_COLUMN}}{format_size(num_bytes):>8}  {label_of(kind)}")
    return text


def _limit(name: str) -> str:
    return {"disk": "the disk", "bus": "the bus", "memory": "memory", "compute": "compute"}[name]


def _rates(plan: Plan) -> list[str]:
    """The rates by where they come from, a line for each."""
    rates = plan.rates
    by_source: dict[str, list[str]] = {}
    for name, rate, unit in (
        ("disk", rates.disk, "B/s"),
        ("bus", rates.bus, "B/s"),
        ("memory", rates.memory, "B/s"),
        ("compute", rates.compute, "FLOP/s"),
    ):
        if rate is not None:
            number = format_size(rate.per_second).removesuffix("B")  # ends with a prefix: "2 G"
            by_source.setdefault(rate.source, []).append(f"{name} {number}{unit}")
    hint = "; run `ollm doctor` to measure"
    return [
        f"{', '.join(told)} ({source}{hint if source == 'assumed' else ''})"
        for source, told in by_source.items()
    ]
