"""Every family's tiny model: greedy tokens of un-offloaded transformers on the same device, bit for
bit where products have the same shapes, inside the budget, and as planned.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.parts.peaks import Peaks, as_planned, over_budget
from benchmarks.gpu.parts.work import OutOfTime, Tell, Work
from ollm_conformance.models import DTYPES
from ollm_conformance.subject import CHUNK, Reference, Subject
from ollm_core.generate.causal_lm import StreamedModel
from ollm_core.options import PlanOptions
from ollm_core.planning.plan import Plan
from ollm_core.planning.planner import Planner
from ollm_core.plugins.registry import Registry, supports

_ROOMY = 10**9


@dataclass(frozen=True, slots=True)
class Case:
    """One way to run a tiny model."""

    dtype: str
    kv: str
    least: bool
    """In the least memory of both, so that all weights are streamed and the head is cut; else all
    is kept on the device.
    """

    @property
    def name(self) -> str:
        """For the record."""
        return f"{self.dtype}, KV on {self.kv}, {'least memory' if self.least else 'all kept'}"


def cases(work: Work) -> Iterator[Case]:
    """By worth: what models are published in first."""
    kinds = [("device", False), ("disk", True), ("host", True), ("device", True)]
    for kv, least in kinds[:2] if work.small else kinds:
        for dtype in ("bfloat16", "float16", "float32"):
            yield Case(dtype, kv, least)


def run(work: Work, tell: Tell, adapter: str) -> None:
    """Compare all cases of one adapter. Raises OutOfTime."""
    torch.set_num_threads(1)
    registry = Registry.discover()
    subject = Subject(registry.adapters[adapter], work.path(f"parity-{adapter}"))
    bench = _Bench(work, subject)
    left = list(cases(work))
    while left:
        if work.seconds_left < 5:
            raise OutOfTime(f"{len(left)} cases were not compared, from {left[0].name} on")
        case = left.pop(0)
        if supports(subject.adapter, f"kv-{case.kv}"):
            found = bench.compare(case)
            tell(case.name, found.pop("told"), **found)


class _Bench:
    """What the cases of one adapter share: the un-offloaded models, made once for each dtype."""

    def __init__(self, work: Work, subject: Subject) -> None:
        self._work = work
        self._subject = subject
        self._num_tokens, self._num_new = (130, 4) if work.small else (300, 24)
        self._prompt = subject.prompt(self._num_tokens).to(work.device)
        self._expected: dict[str, tuple[list[int], Tensor]] = {}
        self._planners: dict[str, Planner] = {}
        chunked = supports(subject.adapter, "chunked-prefill")
        self._chunk_size = CHUNK if chunked else None

    def compare(self, case: Case) -> dict[str, Any]:
        """Run it, as planned, and hold tokens, logits and memory against what they should be."""
        directory = self._subject.tiny(case.dtype)
        tokens, logits = self._reference(case.dtype, directory)
        plan = self._plan(case, directory)
        with (
            Peaks(self._work.device) as peaks,
            self._subject.open(
                directory,
                device=self._work.device,
                device_memory=plan.device_memory,
                host_memory=plan.host_memory,
                kv=case.kv,
            ) as model,
        ):
            found_logits = self._logits(model)
        found_tokens = found_logits.argmax(-1).tolist()
        found = peaks.beside(model, plan)
        same = tokens == found_tokens
        found |= _difference(found_logits, logits, tokens, found_tokens)
        fault = "" if same else _first_difference(found)
        told = f"{len(tokens)} tokens {'the same' if same else 'DIFFERENT'}, "
        told += "bit for bit" if found["same_bits"] else f"logits off by {found['off_by']:.2g}"
        fault = fault or over_budget(found)
        return {"told": f"{told}; {as_planned(found)}", "fault": fault, **found}

    def _logits(self, model: StreamedModel) -> Tensor:
        """Behind each greedy token, [num_new, V] on the CPU. `generate` would have tensors of its
        own on the device.
        """
        ids, found = self._prompt.cpu(), []
        num_tokens = self._num_tokens + self._num_new
        with closing(model.new_cache(num_tokens=num_tokens)) as cache:
            while len(found) < self._num_new:
                made = model(input_ids=ids[None], past_key_values=cache, logits_to_keep=1)
                found.append(made.logits[0].cpu().float())
                del made
                ids = found[-1].argmax(-1)
        return torch.cat(found)

    def _reference(self, dtype: str, directory: Path) -> tuple[list[int], Tensor]:
        if dtype not in self._expected:
            chunk_size = self._chunk_size or self._num_tokens
            reference = Reference(directory, DTYPES[dtype], self._work.device, chunk_size)
            tokens, logits = reference.greedy(self._prompt, self._num_new)
            self._expected[dtype] = tokens, logits.cpu().float()
        return self._expected[dtype]

    def _plan(self, case: Case, directory: Path) -> Plan:
        if case.dtype not in self._planners:
            registry = self._subject.registry
            device = PlanOptions(device=self._work.device, registry=registry)
            self._planners[case.dtype] = Planner(directory, device)
        planner = self._planners[case.dtype]
        options = replace(
            planner.options,
            device_memory=_ROOMY,
            host_memory=_ROOMY,
            context=self._num_tokens + self._num_new,
            max_new_tokens=self._num_new,
            kv=case.kv,
            attention="exact",
            chunk_size=self._chunk_size,
        )
        plan = planner.plan(options, compare=False)
        if case.least:
            least = replace(
                options,
                device_memory=plan.smallest_device_bytes,
                host_memory=max(plan.smallest_host_bytes, 1),
            )
            plan = planner.plan(least, compare=False)
        assert plan.fits, plan.reason
        return plan


def _difference(
    found: Tensor, expected: Tensor, tokens: list[int], found_tokens: list[int]
) -> dict[str, Any]:
    """Logits [num_new, V] up to the first token that differs: after it the texts are two."""
    steps = next(
        (
            i
            for i, (one, other) in enumerate(zip(tokens, found_tokens, strict=True))
            if one != other
        ),
        len(tokens) - 1,
    )
    ours, theirs = found[: steps + 1].float(), expected[: steps + 1]
    worst = float((ours - theirs).abs().max())
    best = theirs[-1].topk(2).values
    return {
        "same_bits": bool(torch.equal(ours, theirs)),
        "off_by": worst / max(float(theirs.abs().max()), 1e-9),
        "num_tokens": len(tokens),
        "first_difference": None if tokens == found_tokens else steps,
        "margin_there": float(best[0] - best[1]),
    }


def _first_difference(found: dict[str, Any]) -> str:
    return (
        f"token {found['first_difference']} of {found['num_tokens']} differs; there the best logit "
        f"led by {found['margin_there']:.3g}, and ours are off by {found['off_by']:.2g} of the "
        "largest"
    )
