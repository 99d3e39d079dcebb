"""What fits where, and how long it takes: a run is rehearsed, timed, and compared with others."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ollm_core.attention import ATTENTIONS
from ollm_core.budgets import Budgets, layer_limits, stated_budgets
from ollm_core.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint, open_checkpoint, read_config
from ollm_core.errors import DoesNotFitError, InputError
from ollm_core.estimate import Estimate, slowest
from ollm_core.hub import is_on_disk, local_path, models_root
from ollm_core.interfaces import ModelAdapter
from ollm_core.machine import planned_device
from ollm_core.parts import DTYPES, take_apart
from ollm_core.plans import Change, Plan
from ollm_core.rates import Rates, find_rates
from ollm_core.registry import Registry, supports
from ollm_core.rehearsal import Rehearsal, Rehearsed, Scenario
from ollm_core.stores import TIERS
from ollm_core.types import Config

DEFAULT_CONTEXT = 8192
_STEP = 256  # the largest context is found as a multiple of it
_WORTH = 0.9  # a change is named if it leaves at most this part of the time
_NUM_CHANGES = 3
_COUNT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kKmM]?)\s*")


def plan(
    path_or_id: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    device_memory: str | int | None = None,
    host_memory: str | int | None = None,
    device_layers: int | None = None,
    host_layers: int | None = None,
    context: str | int | None = None,
    batch: int = 1,
    max_new_tokens: int = 256,
    kv: str = "auto",
    attention: str = "auto",
    chunk_size: int | None = None,
    models_dir: str | Path | None = None,
    registry: Registry | None = None,
) -> Plan:
    """Plan a run of the model in a directory, of a lone config.json, or of a known id: whether it
    fits, what it holds, how long it takes. Nothing is read but headers, nothing is allocated.

    - `device`: as for `ollm.load`; "cuda" also where there is none, then with 8 GB by default.
    - `context`: tokens of each of `batch` sequences at the end, `max_new_tokens` included, as
      `100k` or an int. Default: 8,192, or what the model has.
    - The rest is as for `ollm.load`.

    Raises an OllmError for what cannot be planned; a run that does not fit is a plan that says so.
    """
    registry = registry or Registry.discover()
    target = planned_device(device)
    _one_of("dtype", dtype, ("auto", *DTYPES))
    _one_of("kv", kv, ("auto", *TIERS))
    _one_of("attention", attention, ("auto", *ATTENTIONS))
    counts = {"batch": batch, "max_new_tokens": max_new_tokens, "chunk_size": chunk_size}
    for name, count in counts.items():
        if count is not None and count < 1:
            raise InputError(f"{name} is {count}", hint="it must be at least 1")
    budgets = stated_budgets(target, device_memory, host_memory, must_be_there=False)
    layers = layer_limits(target, device_layers, host_layers)
    found = _find(path_or_id, registry, models_dir)
    parts = take_apart(
        found.adapter,
        found.config,
        found.checkpoint,
        registry.offers("ollm_weight_codecs"),
        dtype=dtype,
        device=target,
        where=found.where,
        bare=True,
    )
    positions = int(parts.skeleton.config.max_position_embeddings)
    length = min(DEFAULT_CONTEXT, positions) if context is None else parse_tokens(context)
    if length > positions:
        raise InputError(
            f"a context of {length} tokens is past the model's {positions} positions",
            hint=f"ask for at most {positions}",
        )
    if length <= max_new_tokens:
        raise InputError(
            f"a context of {length} tokens leaves no room for a prompt before "
            f"{max_new_tokens} new ones",
            hint="give a larger context, or a smaller max_new_tokens",
        )
    scenario = Scenario(length, max_new_tokens, batch, kv, attention, chunk_size, layers)
    rates = find_rates(found.where, target, parts.dtype)
    return _Planner(Rehearsal(parts), Estimate(parts), rates, budgets, scenario, positions).plan(
        str(path_or_id), from_files=found.checkpoint is not None
    )


def parse_tokens(text: str | int) -> int:
    """A number of tokens from `100k` (100,000), `1M`, or a plain number. Raises InputError."""
    match = _COUNT.fullmatch(str(text))
    count = 0
    if match:
        count = int(float(match[1]) * {"": 1, "k": 1000, "m": 1_000_000}[match[2].lower()])
    if count < 1:
        raise InputError(
            f"{str(text)!r} is not a number of tokens", hint="write it as in 8192 or 100k"
        )
    return count


@dataclass(frozen=True, slots=True)
class _Found:
    adapter: ModelAdapter
    config: Config
    checkpoint: Checkpoint | None
    where: Path


def _find(path_or_id: str | Path, registry: Registry, models_dir: str | Path | None) -> _Found:
    """The model's config, and its files if they are there."""
    path = Path(path_or_id).expanduser()
    if path.is_dir():
        directory = path
    elif path.is_file() or path.suffix == ".json":
        config = read_config(path.parent, path.name)
        return _Found(registry.adapter_for(config), config, None, path)
    elif len(path.parts) != 1:
        raise InputError(f"there is no directory {path}", hint="ollm list-models shows known ids")
    elif is_on_disk(str(path_or_id), models_dir):
        directory = local_path(str(path_or_id), models_dir)
    else:
        adapter, entry = registry.find(str(path_or_id))
        if not is_on_disk(entry.id, models_dir):
            return _Found(adapter, entry.config, None, models_root(models_dir))
        directory = local_path(entry.id, models_dir)
    config = read_config(directory)
    adapter = registry.adapter_for(config)
    has_files = any((directory / name).is_file() for name in (INDEX_FILE, SINGLE_FILE))
    return _Found(adapter, config, open_checkpoint(directory) if has_files else None, directory)


class _Planner:
    """One question, and the rehearsals that answer it."""

    def __init__(
        self,
        rehearsal: Rehearsal,
        estimate: Estimate,
        rates: Rates,
        budgets: Budgets,
        scenario: Scenario,
        positions: int,
    ) -> None:
        self._rehearsal = rehearsal
        self._estimate = estimate
        self._rates = rates
        self._budgets = budgets
        self._scenario = scenario
        self._positions = positions

    def plan(self, model: str, *, from_files: bool) -> Plan:
        """All of it."""
        rehearsal, scenario, budgets = self._rehearsal, self._scenario, self._budgets
        parts, reason = rehearsal.parts, ""
        least = rehearsal.least(scenario, Budgets(1, 1))
        try:
            run = rehearsal.run(budgets, scenario)
        except DoesNotFitError as refused:
            reason = refused.message
            budgets = rehearsal.least(scenario, budgets)
            run = rehearsal.run(budgets, scenario)
        largest = self._largest_context()
        prefill, token = self._times(run, scenario)
        return Plan(
            model=model,
            adapter=parts.adapter.name,
            device=str(parts.device),
            dtype=str(parts.dtype).removeprefix("torch."),
            device_memory=self._budgets.device,
            host_memory=self._budgets.host,
            context=scenario.context,
            max_new_tokens=scenario.new_tokens,
            batch=scenario.batch,
            from_files=from_files,
            fits=not reason,
            reason=reason,
            hint=self._hint(budgets, largest) if reason else "",
            device_peak_bytes=run.device_peak.device_bytes,
            host_peak_bytes=run.host_peak.host_bytes,
            disk_bytes=run.disk_bytes,
            weight_bytes=parts.checkpoint.total_bytes,
            kv_bytes=self._estimate.kv_bytes(scenario),
            bytes_read_per_token=round(self._estimate.token(run, scenario).disk_bytes),
            prefill_seconds=prefill[1],
            prefill_limited_by=prefill[0],
            tokens_per_second=scenario.batch / token[1],
            limited_by=token[0],
            placement=self._placement(run),
            device_bytes=run.device_peak.device,
            host_bytes=run.host_peak.host,
            smallest_device_bytes=least.device,
            smallest_host_bytes=least.host,
            largest_context=largest,
            changes=self._changes(run, fits=not reason),
            rates=self._rates,
            moments=run.moments,
        )

    def _times(
        self, run: Rehearsed, scenario: Scenario
    ) -> tuple[tuple[str, float], tuple[str, float]]:
        """What limits the prompt and a decode step, and their seconds."""
        estimate, rates = self._estimate, self._rates
        return (
            slowest(estimate.prompt(run, scenario).seconds(rates)),
            slowest(estimate.token(run, scenario).seconds(rates)),
        )

    def _placement(self, run: Rehearsed) -> dict[str, Any]:
        held, estimate = run.held, self._estimate
        layers = len(self._rehearsal.parts.units.layers)
        found: dict[str, Any] = {
            "layers": layers,
            "head_parts": held.num_units - layers,
            "device_units": held.num_device_units,
            "host_units": held.num_host_units,
            "device_layers": held.num_device_layers,
            "host_layers": held.num_host_layers,
            "streamed_units": held.num_units - held.num_device_units - held.num_host_units,
            "ring_buffers": held.num_slots,
            "ring_buffer_bytes": held.slot_bytes,
            "kv": run.kv_tier,
            "chunk_size": run.chunk_size,
            "attention": run.attention,
            "hidden_states": "host" if run.hidden_on_host else "device",
        }
        if estimate.num_experts:
            found |= {
                "experts": estimate.num_experts,
                "device_experts": held.num_device_experts,
                "host_experts": held.num_host_experts,
            }
        return found

    def _largest_context(self) -> int:
        """Contexts are tried as multiples of 256, and the model's own limit."""
        scenario = self._scenario
        if self._fits(self._positions):
            return self._positions
        least, most = scenario.new_tokens // _STEP + 1, -(-self._positions // _STEP)
        if self._fits(scenario.context):
            least = max(least, scenario.context // _STEP)
            known = scenario.context
        else:
            most = min(most, -(-scenario.context // _STEP))
            known = 0
        low, high = least - 1, most  # the first fits or is too short, the last does not fit
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._fits(middle * _STEP) else (low, middle)
        return max(known, low * _STEP if low >= least else 0)

    def _fits(self, context: int) -> bool:
        return self._rehearsal.fits(replace(self._scenario, context=context), self._budgets)

    def _hint(self, budgets: Budgets, largest: int) -> str:
        allow = []
        for name, needed, given in (
            ("--device-memory", budgets.device, self._budgets.device),
            ("--host-memory", budgets.host, self._budgets.host),
        ):
            if needed > given:
                allow.append(f"{name} {_as_option(needed)}")
        hint = f"allow {' and '.join(allow)}"
        return f"{hint}, or --context {largest}" if largest else hint

    def _changes(self, run: Rehearsed, *, fits: bool) -> list[Change]:
        """Those that would help most, first the one that helps most."""
        found = []
        for option, scenario, budgets in self._candidates(run):
            try:
                other = self._rehearsal.run(budgets, scenario, ends_only=True)
            except DoesNotFitError:
                continue
            found.append((self._seconds(other, scenario), option, other, scenario))
        found.sort(key=lambda change: change[0])
        most = self._seconds(run, self._scenario) * _WORTH if fits else float("inf")
        changes = []
        for seconds, option, other, scenario in found[:_NUM_CHANGES]:
            if seconds <= most:
                (_, prefill), (_, token) = self._times(other, scenario)
                peak = other.device_peak.device_bytes
                changes.append(Change(option, True, prefill, scenario.batch / token, peak))
        return changes

    def _candidates(self, run: Rehearsed) -> Iterator[tuple[str, Scenario, Budgets]]:
        scenario, budgets = self._scenario, self._budgets
        parts = self._rehearsal.parts
        for tier in TIERS:
            if tier != run.kv_tier and supports(parts.adapter, f"kv-{tier}"):
                yield f"--kv {tier}", replace(scenario, kv=tier), budgets
        more = 2 * budgets.device
        yield f"--device-memory {_as_option(more)}", scenario, replace(budgets, device=more)
        more = 2 * budgets.host
        if parts.device.type != "cpu":
            yield f"--host-memory {_as_option(more)}", scenario, replace(budgets, host=more)
        if run.attention == "exact" and supports(parts.adapter, "blockwise-attention"):
            yield "--attention blockwise", replace(scenario, attention="blockwise"), budgets
        half = scenario.context // 2
        if half > scenario.new_tokens:
            yield f"--context {half}", replace(scenario, context=half), budgets

    def _seconds(self, run: Rehearsed, scenario: Scenario) -> float:
        (_, prefill), (_, token) = self._times(run, scenario)
        return prefill + scenario.new_tokens * token


def _as_option(num_bytes: int) -> str:
    """A size as an option takes it, rounded up."""
    return f"{-(-num_bytes // 10**6)}MB"


def _one_of(what: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise InputError(f"{what} is {value!r}", hint=f"one of: {', '.join(allowed)}")
