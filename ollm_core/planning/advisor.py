"""Answers one planning question: dry runs of the options, and of better ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ollm_core.calibration.rates import Rates
from ollm_core.errors import DoesNotFitError
from ollm_core.kv.tiers import TIERS
from ollm_core.memory.budgets import Budgets
from ollm_core.memory.pair import PerMemory
from ollm_core.planning.cost_model import Estimate, slowest
from ollm_core.planning.dry_run import DryRun, DryRunResult, Scenario
from ollm_core.planning.plan import Change, Plan
from ollm_core.plugins.registry import supports

_STEP = 256  # the largest context is found as a multiple of it
_MOST_WHOLE = 2048  # tokens; following a prompt that may not be cut takes about 1 ms for each
_WORTH = 0.9  # a change is named if it leaves at most this part of the time
_NUM_CHANGES = 3


class Question:
    """A scenario and budgets for one model."""

    def __init__(
        self,
        dry_run: DryRun,
        estimate: Estimate,
        rates: Rates,
        budgets: Budgets,
        scenario: Scenario,
        positions: int,
    ) -> None:
        self._dry_run = dry_run
        self._estimate = estimate
        self._rates = rates
        self._budgets = budgets
        self._scenario = scenario
        self._positions = positions

    def answer(self, model: str, *, from_files: bool, compare: bool) -> Plan:
        """The whole plan, with other ways to run it if they are to be compared. `model` is what it
        was called, `from_files` whether its own were seen.
        """
        dry_run, scenario, budgets = self._dry_run, self._scenario, self._budgets
        spec, reason = dry_run.spec, ""
        least = dry_run.least(scenario, PerMemory(1, 1))
        try:
            run = dry_run.run(budgets, scenario)
        except DoesNotFitError as refused:
            reason = refused.message
            budgets = dry_run.least(scenario, budgets)
            run = dry_run.run(budgets, scenario)
        largest = self._largest_context() if compare else 0
        prefill, token = self._times(run, scenario)
        return Plan(
            model=model,
            adapter=spec.adapter.name,
            device=str(spec.device),
            dtype=str(spec.dtype).removeprefix("torch."),
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
            weight_bytes=spec.checkpoint.total_bytes,
            kv_bytes=self._estimate.kv_bytes(scenario),
            bytes_read_per_token=round(
                self._estimate.token(run, scenario).disk_bytes / scenario.batch
            ),
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
            changes=self._changes(run, fits=not reason) if compare else (),
            rates=self._rates,
            moments=run.moments,
        )

    def _times(
        self, run: DryRunResult, scenario: Scenario
    ) -> tuple[tuple[str, float], tuple[str, float]]:
        """What limits the prompt and a decode step, and their seconds."""
        estimate, rates = self._estimate, self._rates
        return (
            slowest(estimate.prompt(run, scenario).seconds(rates)),
            slowest(estimate.token(run, scenario).seconds(rates)),
        )

    def _placement(self, run: DryRunResult) -> dict[str, Any]:
        held, estimate = run.held, self._estimate
        layers = len(self._dry_run.spec.units.layers)
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
        """Contexts are tried as multiples of 256, and the model's own limit; where a prompt is
        taken whole none beyond 2,048 or the context that is asked for.
        """
        scenario, positions = self._scenario, self._positions
        if self._dry_run.takes_prompts_whole:
            positions = min(positions, max(scenario.context, _MOST_WHOLE))
        if self._fits(positions):
            return positions
        least, most = scenario.new_tokens // _STEP + 1, -(-positions // _STEP)
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
        return self._dry_run.fits(replace(self._scenario, context=context), self._budgets)

    def _hint(self, budgets: Budgets, largest: int) -> str:
        allow = []
        for name, needed, given in (
            ("--device-memory", budgets.device, self._budgets.device),
            ("--host-memory", budgets.host, self._budgets.host),
        ):
            if needed > given:
                allow.append(f"{name} {_as_option(needed)}")
        hint = f"allow {' and '.join(allow)}"
        return f"{hint}, or a context of at most {largest} tokens" if largest else hint

    def _changes(self, run: DryRunResult, *, fits: bool) -> list[Change]:
        """Those that would help most, first the one that helps most."""
        found = []
        for option, scenario, budgets in self._candidates(run):
            try:
                other = self._dry_run.run(budgets, scenario, ends_only=True)
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

    def _candidates(self, run: DryRunResult) -> Iterator[tuple[str, Scenario, Budgets]]:
        scenario, budgets = self._scenario, self._budgets
        spec = self._dry_run.spec
        for tier in TIERS:
            if tier != run.kv_tier and supports(spec.adapter, f"kv-{tier}"):
                yield f"--kv {tier}", replace(scenario, kv=tier), budgets
        more = 2 * budgets.device
        yield f"--device-memory {_as_option(more)}", scenario, budgets._replace(device=more)
        more = 2 * budgets.host
        if spec.device.type != "cpu":
            yield f"--host-memory {_as_option(more)}", scenario, budgets._replace(host=more)
        if run.attention == "exact" and supports(spec.adapter, "blockwise-attention"):
            yield "--precision fast", replace(scenario, attention="auto"), budgets
        half = scenario.context // 2
        if half > scenario.new_tokens:
            yield f"--context {half}", replace(scenario, context=half), budgets

    def _seconds(self, run: DryRunResult, scenario: Scenario) -> float:
        (_, prefill), (_, token) = self._times(run, scenario)
        return prefill + scenario.new_tokens * token


def _as_option(num_bytes: int) -> str:
    """A size as an option takes it, rounded up."""
    return f"{-(-num_bytes // 10**6)}MB"
