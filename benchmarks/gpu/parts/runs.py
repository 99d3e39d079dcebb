"""One run of a model, timed, cold, and held against its plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import GenerationConfig

import ollm
from benchmarks.disk.disk import probe
from benchmarks.gpu.parts.checkpoints import Checkpoint
from benchmarks.gpu.parts.peaks import Peaks, as_planned, over_budget, ratio
from benchmarks.gpu.parts.work import Work
from benchmarks.tools.measure import (
    checkpoint_files,
    drop_from_cache,
    random_prompt,
    timed_generate,
)
from ollm_core.contracts.progress import Stats
from ollm_core.generate.causal_lm import StreamedModel
from ollm_core.options import PlanOptions
from ollm_core.planning.plan import Plan
from ollm_core.planning.planner import Planner
from ollm_core.profiling import Profile

_PROBE_BYTES = 2_000_000_000
_GENERATE_BYTES = 64  # for a token of prompt: its id, masks and positions, some of them twice
_PLANNED = (
    "device_memory", "host_memory", "kv", "device_layers", "host_layers", "attention", "chunk_size"
)  # fmt: skip
"""Options of a run that its plan is told too."""


def measured(
    work: Work,
    checkpoint: Checkpoint,
    num_tokens: int,
    num_new: int,
    *,
    warming: bool = False,
    cold: bool = True,
    profile: Profile | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Run a prompt of `num_tokens` and `num_new` tokens after it with the `options` of `ollm.load`;
    the numbers for the record.

    With `warming` a few tokens are generated before, so that what is kept is there; with `cold` the
    files are dropped from the page cache before every token.
    """
    files = checkpoint_files(checkpoint.path)
    plan = planned(work, checkpoint, num_tokens, num_new, options)
    if not plan.fits:
        raise RuntimeError(f"it does not fit: {plan.reason} ({plan.hint})")
    with (
        Peaks(work.device) as peaks,
        ollm.load(
            checkpoint.path,
            device=work.device,
            kv_dir=work.path("kv") if options.get("kv") == "disk" else None,
            keep_kv=False,
            profile=profile,
            **options,
        ) as model,
    ):
        model.generation_config = GenerationConfig(pad_token_id=0)
        if warming:
            _warm(model, prompt_of(model, min(num_tokens, 64)).to(work.device))
        timing = timed_generate(
            model,
            prompt_of(model, num_tokens).to(work.device),
            num_new,
            snapshot=lambda: model.stats,
            between_tokens=(lambda: drop_from_cache(files)) if cold else (lambda: None),
            eos_token_id=None,
        )
        stats, in_memory = model.stats, model.weights.in_memory
    found = peaks.beside(model, plan)
    first, last = timing.snapshots[0], timing.snapshots[-1]
    passes = last.weight_passes - first.weight_passes
    weight_bytes = last.weight_bytes_read - first.weight_bytes_read
    kv_bytes = last.kv_bytes_read - first.kv_bytes_read
    return {
        "num_layers": checkpoint.num_layers,
        "prompt_tokens": num_tokens,
        "new_tokens": num_new,
        "options": {key: str(value) for key, value in options.items()},
        "prefill_seconds": round(timing.prefill_seconds, 4),
        "planned_prefill_seconds": round(plan.prefill_seconds, 4),
        "planned_prefill_limited_by": plan.prefill_limited_by,
        "step_seconds": [round(seconds, 5) for seconds in timing.step_seconds],
        "tokens_per_second": round(timing.decode_tokens_per_second, 4),
        "planned_tokens_per_second": round(plan.tokens_per_second, 4),
        "planned_limited_by": plan.limited_by,
        "weight_bytes": stats.weight_bytes,
        "weights_on_device_bytes": in_memory.device,
        "weights_on_host_bytes": in_memory.host,
        "device_layers": stats.device_layers,
        "host_layers": stats.host_layers,
        "read_bytes_per_pass": weight_bytes // max(passes, 1),
        "kv_read_bytes_per_pass": kv_bytes // max(passes, 1),
        "prefill_kv_read_bytes": first.kv_bytes_read,
        "read_seconds_per_pass": round(
            (last.read_seconds - first.read_seconds) / max(passes, 1), 5
        ),
        **_uploads(first, last),
        "decode_gb_s": round((weight_bytes + kv_bytes) / timing.decode_seconds / 1e9, 3),
        "experts_routed": stats.experts_routed,
        "experts_hit": stats.experts_hit,
        "experts_read": stats.experts_read,
        "kv_disk_bytes": stats.kv_disk_bytes,
        "reader": stats.reader,
        "attention": stats.attention,
        "chunk_size": stats.chunk_size,
        "kv_tier": stats.kv_tier,
        "times_short": stats.times_short,
        "tokens": timing.tokens,
        "generate_bytes": _GENERATE_BYTES * num_tokens + 4 * 4 * model.config.vocab_size,
        **found,
    }


def _uploads(first: Stats, last: Stats) -> dict[str, Any]:
    """What went to the card while decoding and, where a profile timed it, how much of that compute
    did not wait for.
    """
    seconds = last.upload_seconds - first.upload_seconds
    waited = last.upload_waited_seconds - first.upload_waited_seconds
    return {
        "uploaded_bytes": last.uploaded_bytes - first.uploaded_bytes,
        "upload_seconds": round(seconds, 5),
        "upload_hidden_share": round(1 - waited / seconds, 3) if seconds else None,
    }


def fault_of(found: Mapping[str, Any], expected: Mapping[str, Any] | None = None) -> str:
    """What promise a run has broken: the budget, or other tokens than `expected` has."""
    if expected is not None and found["tokens"] != expected["tokens"]:
        return f"tokens {found['tokens']}, expected {expected['tokens']}"
    return over_budget(dict(found), found["generate_bytes"])


def told_of(found: Mapping[str, Any]) -> str:
    """A run in one line."""
    prefill, step = found["prefill_seconds"], 1 / found["tokens_per_second"]
    told = (
        f"{found['prompt_tokens']} tokens in {prefill:.2f} s "
        f"({found['planned_prefill_seconds']:.2f} planned), a token {step:.4f} s "
        f"({1 / found['planned_tokens_per_second']:.4f} planned)"
    )
    if found["read_bytes_per_pass"] or found["kv_read_bytes_per_pass"]:
        told += f", {found['decode_gb_s']:.2f} GB/s"
    return f"{told}; {as_planned(dict(found))}"


def planned(
    work: Work, checkpoint: Checkpoint, num_tokens: int, num_new: int, options: Mapping[str, Any]
) -> Plan:
    """What `ollm plan` says of the run, by the rates that were measured here, if they were."""
    given = {key: options[key] for key in _PLANNED if key in options}
    planned = PlanOptions(
        device=work.device, context=num_tokens + num_new, max_new_tokens=num_new, **given
    )
    return Planner(checkpoint.path, planned).plan(compare=False)


def prompt_of(model: StreamedModel, num_tokens: int) -> Tensor:
    """[1, num_tokens] of the model's vocabulary."""
    return random_prompt(num_tokens) % (model.config.get_text_config().vocab_size - 16) + 8


def disk_limit(checkpoint: Checkpoint, num_bytes: int = _PROBE_BYTES) -> float:
    """GB/s that one thread reads of the checkpoint's own files with nothing else to do."""
    files = checkpoint_files(checkpoint.path)
    there = sum(file.stat().st_size for file in files)
    return probe(files, min(num_bytes, there)).gb_per_second


def share(found: Mapping[str, Any], limit: float) -> float | None:
    """How much of the disk's limit decoding has used."""
    return ratio(found["decode_gb_s"], limit)


def _warm(model: StreamedModel, prompt: Tensor) -> None:
    generate: Any = model.generate
    generate(prompt, max_new_tokens=2, do_sample=False, eos_token_id=None, pad_token_id=0)
