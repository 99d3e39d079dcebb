"""Decode with the true shapes of a large model's layers, inside a memory budget, and hold what is
read against what had to be.

usage: full_shape.py [FAMILY] [--layers 3] [--device-memory 2800MB] [--new 8] [--json FILE]

FAMILY is a key of `FAMILIES`. Its checkpoint has random weights, fewer layers, and is written to
models/full-shape-FAMILY-LAYERS first, a file per layer, if it is not there (gpt-oss-20b with 3
layers: 3.7 GB; qwen3-next-80b with 4, the last of which has full attention: 14.4 GB). The same
prompt is measured twice: cold, and with a model that has worked on other prompts before. The page
cache is dropped before every weight pass, outside the measured time.

A decoded token must cause the kernel to read the experts that its routers chose and that were not
in memory, and the dense part that is not resident, within 5%; else the exit code is 1.

The last line on stdout is the result as JSON; the report for people goes to stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

import ollm
from benchmarks import MODELS
from benchmarks.disk.disk import probe
from benchmarks.tools.aligned import save_aligned
from benchmarks.tools.measure import (
    PeakAnonymousMemory,
    Timing,
    checkpoint_files,
    drop_from_cache,
    environment,
    finish,
    random_prompt,
    read_from_storage,
    timed_generate,
)
from ollm_conformance.models import meta_model
from ollm_core.checkpoint.synthetic import STORED_DTYPES
from ollm_core.generate.causal_lm import StreamedModel
from ollm_core.plugins.registry import Registry
from ollm_core.testing import described_tensors
from ollm_core.weights.units import TORCH_DTYPES

Stored = tuple[str, tuple[int, ...]]
"""safetensors dtype and shape of a tensor."""


@dataclass(frozen=True, slots=True)
class Family:
    """Whose shapes to take."""

    model_id: str
    """In the catalog of an installed adapter."""
    per_layer: tuple[str, ...] = ("layer_types",)
    """Keys of its config.json with an entry for each layer."""


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {"gpt-oss-20b": Family("gpt-oss-20B"), "qwen3-next-80b": Family("qwen3-next-80B")}
)


def config_of(family: Family, num_layers: int) -> dict[str, Any]:
    """The real config.json, with fewer layers."""
    config = dict(Registry.discover().find(family.model_id)[1].config)
    cut = {key: config[key][:num_layers] for key in family.per_layer if key in config}
    return {**config, **cut, "num_hidden_layers": num_layers, "dtype": "bfloat16"}


def files_of(config: dict[str, Any]) -> dict[str, dict[str, Stored]]:
    """The form in which the family is published, a file per layer: its tensors by file, in the
    order of the model.
    """
    shapes = {name: tuple(p.shape) for name, p in meta_model(config).named_parameters()}
    adapter = Registry.discover().adapter_for(config)
    stored = described_tensors(adapter, config, shapes, STORED_DTYPES[config["dtype"]])
    assert stored is not None, f"adapter {adapter.name} does not say what a checkpoint holds"
    files: dict[str, dict[str, Stored]] = {}
    for name, form in stored.items():
        part = name.split("layers.")[-1].split(".")[0] if ".layers." in name else name
        files.setdefault(f"part-{part}.safetensors", {})[name] = form
    return files


def random_tensors(forms: Mapping[str, Stored], generator: torch.Generator) -> dict[str, Tensor]:
    """The tensors of a file, on the CPU. They are drawn where the generator is: a GPU is much
    faster, and gives other numbers.
    """
    return {name: _random(name, *form, generator).cpu() for name, form in forms.items()}


def write_description(
    out: Path, config: dict[str, Any], files: Mapping[str, Iterable[str]]
) -> None:
    """What a checkpoint has beside its tensors: which file has which of them, and config.json."""
    weight_map = {name: file for file, names in files.items() for name in names}
    total_bytes = sum((out / file).stat().st_size for file in files)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    (out / "config.json").write_text(json.dumps(config, indent=1))


def write_checkpoint(out: Path, config: dict[str, Any]) -> None:
    """Random weights in the form in which the family is published; a tensor is in memory with those
    of its layer. All is on the disk at the end: what is not cannot be dropped from the page cache.
    """
    out.mkdir(parents=True, exist_ok=True)
    files = files_of(config)
    generator = torch.Generator().manual_seed(0)
    for file, forms in files.items():
        save_aligned(random_tensors(forms, generator), out / file)
    write_description(out, config, files)


def _random(name: str, dtype: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    value = torch.empty(shape, dtype=TORCH_DTYPES[dtype], device=generator.device)
    if name.endswith("norm.weight"):
        return value.fill_(1)
    if name.endswith("_scales"):  # powers of two from 2 ** -8 to 2 ** -5
        return value.random_(119, 123, generator=generator)
    if value.dtype == torch.uint8:
        return value.random_(0, 256, generator=generator)
    if name.endswith("A_log"):  # decays between those of a trained model
        return value.uniform_(0, 2.7, generator=generator)
    return value.uniform_(-0.035, 0.035, generator=generator)  # as wide as a deviation of 0.02


def measure(args: argparse.Namespace, num_warming: int) -> dict[str, Any]:
    """One run on a newly opened model, after prompts of its own for warming."""
    files = checkpoint_files(args.checkpoint)
    drop_from_cache(files)
    prompts = random_prompt(args.prompt * (num_warming + 1)).split(args.prompt, dim=1)
    with (
        PeakAnonymousMemory() as anonymous,
        ollm.load(
            args.checkpoint,
            device="cpu",
            device_memory=args.device_memory,
            kv="device",
            reader=args.reader,
        ) as model,
    ):
        for prompt in prompts[1:]:
            generate: Any = model.generate
            generate(prompt, max_new_tokens=args.warm_new, do_sample=False, eos_token_id=None)
        timing = timed_generate(
            model,
            prompts[0],
            args.new,
            snapshot=lambda: (read_from_storage(), model.stats, _dense_to_read(model)),
            between_tokens=lambda: drop_from_cache(files),
            eos_token_id=None,
        )
        return {
            "warming_prompts": num_warming,
            "prefill_seconds": round(timing.prefill_seconds, 3),
            "decode_tokens_per_second": round(timing.decode_tokens_per_second, 4),
            **_bytes_of_decode(model, timing),
            "device_limit_bytes": model.stats.device_limit_bytes,
            "device_peak_bytes": model.stats.device_peak_bytes,
            "peak_anonymous_bytes": anonymous.num_bytes,
            "tokens": timing.tokens,
        }


def _dense_to_read(model: StreamedModel) -> int:
    """Bytes of the dense units that are not kept in memory."""
    kept = model.weights.resident.placement.device
    return sum(u.file_bytes for i, u in enumerate(model.weights.units) if i not in kept)


def _bytes_of_decode(model: StreamedModel, timing: Timing[Any]) -> dict[str, Any]:
    """What was read for the decoded tokens, and what had to be."""
    kernel = routed = missing = dense = 0
    for (before, first, _), (after, last, not_kept) in zip(
        timing.snapshots, timing.snapshots[1:], strict=False
    ):
        kernel += after - before
        now_routed = last.experts_routed - first.experts_routed
        routed += now_routed
        missing += now_routed - (last.experts_hit - first.experts_hit)
        dense += not_kept
    sizes = {u.file_bytes for layer in model.weights.expert_units.values() for u in layer}
    (expert_bytes,) = sizes
    wanted, tokens = missing * expert_bytes + dense, len(timing.snapshots) - 1
    first, last = timing.snapshots[0][1], timing.snapshots[-1][1]
    read_seconds = last.read_seconds - first.read_seconds
    return {
        "expert_bytes": expert_bytes,
        "experts_routed_per_token": routed / tokens,
        "experts_missing_per_token": round(missing / tokens, 3),
        "dense_bytes_per_token": dense // tokens,
        "needed_bytes_per_token": wanted // tokens,
        "read_bytes_per_token": kernel // tokens,
        "read_to_needed": round(kernel / wanted, 4),
        "decode_gb_s": round(kernel / timing.decode_seconds / 1e9, 3),
        "reader_gb_s": round(kernel / read_seconds / 1e9, 3) if read_seconds else 0.0,
        "reading_share_of_time": round(read_seconds / timing.decode_seconds, 3),
        "resident_bytes": last.resident_bytes,
        "reader": last.reader,
    }


def report(name: str, run: dict[str, Any]) -> None:
    """One run, for people."""
    print(
        f"{name:5} {run['decode_tokens_per_second']:.3f} tokens/s, "
        f"{run['read_bytes_per_token'] / 1e9:.3f} GB read per token, "
        f"{run['read_to_needed']:.3f} of what had to be; "
        f"{run['experts_missing_per_token']:.1f} of {run['experts_routed_per_token']:.0f} experts "
        f"not in memory; {run['decode_gb_s']:.2f} GB/s, the reader alone {run['reader_gb_s']:.2f}; "
        f"peak {run['device_peak_bytes'] / 1e9:.3f} of {run['device_limit_bytes'] / 1e9:.3f} GB",
        file=sys.stderr,
        flush=True,
    )


def runs_of(args: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """Cold and warm, by name."""
    for name, num_warming in (("cold", 0), ("warm", args.warming)):
        run = measure(args, num_warming)
        report(name, run)
        yield name, run


def main() -> None:
    parser = argparse.ArgumentParser(description="Decode with the true shapes of a large model.")
    parser.add_argument("family", nargs="?", default="gpt-oss-20b", choices=list(FAMILIES))
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--checkpoint", type=Path, help="instead of the directory under models/")
    parser.add_argument("--prompt", type=int, default=4, help="prompt tokens")
    parser.add_argument("--new", type=int, default=8, help="new tokens, at least 2")
    parser.add_argument("--warming", type=int, default=3, help="other prompts before the warm run")
    parser.add_argument("--warm-new", type=int, default=8, help="new tokens of each of those")
    parser.add_argument("--device-memory", default="2800MB")
    parser.add_argument("--reader", default="direct", choices=["auto", "direct", "mmap"])
    parser.add_argument("--json", type=Path, help="write the record to this file")
    args = parser.parse_args()
    args.checkpoint = args.checkpoint or MODELS / f"full-shape-{args.family}-{args.layers}"
    if not (args.checkpoint / "config.json").exists():
        print(f"writing {args.checkpoint.name}", file=sys.stderr, flush=True)
        write_checkpoint(args.checkpoint, config_of(FAMILIES[args.family], args.layers))
    files = checkpoint_files(args.checkpoint)
    before = probe(files)
    runs = dict(runs_of(args))
    after = probe(files)
    record = {
        **environment(args.checkpoint),
        "family": args.family,
        "num_layers": args.layers,
        "weight_bytes": sum(path.stat().st_size for path in files),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "cache": "dropped before every weight pass",
        "disk_limit_gb_s": [round(rate.gb_per_second, 3) for rate in (before, after)],
        "runs": runs,
    }
    finish(record, args.json)
    if any(abs(run["read_to_needed"] - 1) > 0.05 for run in runs.values()):
        raise SystemExit("what was read is more than 5% off what had to be")


if __name__ == "__main__":
    main()
