"""The verb `doctor`: measures this machine, so that `plan` can predict times."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from ollm_core.cli.missing import missing
from ollm_core.cli.options import debug_option, dtype_option, json_option, options_of
from ollm_core.cli.output import print_json
from ollm_core.memory.sizes import format_size


@click.command(short_help="Measure how fast your disk and your device are.")
@options_of("doctor")
@dtype_option("dtype to benchmark.")
@json_option
@debug_option
def doctor(device: str, dtype: str, models_dir: str | None, as_json: bool) -> None:
    """Measure your disk and your device, so that `ollm plan` knows how fast they are; and say what
    is not installed, and what it would bring.
    """
    from ollm_core.calibration.rates import (
        PRECISIONS,
        as_fields,
        find_rates,
        measure_rates,
        measured_attention,
        measured_readers,
        rates_file,
    )
    from ollm_core.checkpoint.locate import models_root
    from ollm_core.device.dtypes import DTYPES
    from ollm_core.device.select import pick_device
    from ollm_core.memory.budgets import DEVICE_DEFAULT, HOST_DEFAULT, default_budgets
    from ollm_core.plugins.registry import Registry

    target = pick_device(device)
    root = models_root(models_dir)
    rates = measure_rates(root, target, DTYPES[dtype])
    readers = measured_readers(root)
    attention = measured_attention(target, DTYPES[dtype])
    budgets = default_budgets(target)
    adapters = [one for plugin in Registry.discover().plugins for one in plugin.adapters]
    lacking = missing(str(target), list(readers), len(adapters))
    if as_json:
        told = {"device": str(target), "dtype": dtype, "kept_in": str(rates_file())}
        defaults = {"device_memory": budgets.device, "host_memory": budgets.host}
        more: dict[str, Any] = {"readers": dict(readers), "attention": dict(attention)}
        more |= {"missing": [asdict(one) for one in lacking]}
        print_json({**told, **defaults, **as_fields(rates), **more})
        return
    click.echo(f"disk     {format_size(rates.disk.per_second)}/s, read from {root}")
    each = ", ".join(f"{name} {format_size(rate)}/s" for name, rate in readers.items())
    click.echo(f"reader   {max(readers, key=lambda name: readers[name])} is the fastest: {each}")
    click.echo(
        f"memory   {format_size(rates.memory.per_second)}/s of {dtype} weights on {target}, "
        f"{format_size(rates.fresh.per_second)}/s of the host where it was not used before"
    )
    if rates.bus is not None:
        click.echo(f"bus      {format_size(rates.bus.per_second)}/s from host to {target}")
    click.echo(f"compute  {rates.compute.per_second / 1e9:.4g} GFLOP/s in {dtype} on {target}")
    click.echo(f"{'':<9}by number of tokens:")
    click.echo(f"{'':<9}{'':<6}" + "".join(f"{rows:>8}" for rows in rates.products))
    for precision in PRECISIONS:
        by_rows = find_rates(root, target, DTYPES[dtype], precision).products
        each = "".join(f"{rate / 1e9:>8.4g}" for rate in by_rows.values())
        click.echo(f"{'':<9}{precision:<6}{each}")
    click.echo(
        f"layer    {1e6 / rates.layer.per_second:.3g} us per call beside products and attention, "
        f"{1e9 / rates.states.per_second:.2g} ns per number it makes"
    )
    if attention:
        best = max(attention, key=lambda name: attention[name])
        each = ", ".join(f"{name} {rate / 1e9:.4g}" for name, rate in attention.items())
        click.echo(f"blocks   {best} attention is the fastest: {each} GFLOP/s")
    click.echo(
        f"limits   {format_size(budgets.device)} device memory, {format_size(budgets.host)} host "
        "memory, by default:"
    )
    click.echo(f"{'':<9}device: {DEVICE_DEFAULT}")
    click.echo(f"{'':<9}host: {HOST_DEFAULT}")
    click.echo(f"saved in {rates_file()}")
    for i, one in enumerate(lacking):
        click.echo(f"{'' if i else 'missing':<9}{one.name}: for {one.gain}; {one.hint}")
