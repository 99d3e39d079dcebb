"""Time one peer on one checkpoint, cold, on the CPU, in the environment that has the peer.

usage: run_peer.py PEER CHECKPOINT PROMPT [--new 6]
       run_peer.py PEER CHECKPOINT --prepare

PROMPT is a JSON file with a list of token ids. The checkpoint and every copy of it that a peer
makes lie in the directory CHECKPOINT and are dropped from the page cache before every weight pass.
--prepare only opens the model, so that a peer that makes a copy has made it before it is measured.
Prints the one line that `cold.told` describes. `compare.py` is what calls this.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from benchmarks.tools.cold import ColdFiles, Counts, PeakAnonymousMemory, Timing, told

Generate = Callable[[list[int], int, ColdFiles], Timing[Counts]]


def transformers_like(model: Any) -> Generate:
    """Greedy tokens from a model with transformers' `generate`."""

    def generate(prompt: list[int], num_new_tokens: int, dropping: ColdFiles) -> Timing[Counts]:
        import torch

        from benchmarks.tools.measure import timed_generate

        return timed_generate(
            model,
            torch.tensor([prompt]),
            num_new_tokens,
            snapshot=Counts.now,
            between_tokens=dropping,
            use_cache=True,
        )

    return generate


def open_accelerate(checkpoint: Path, _: int) -> Generate:
    """transformers with accelerate's offload: layers and head on disk, the embedding in memory."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    num_layers = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False).num_hidden_layers
    kept = ("model.embed_tokens", "model.norm", "model.rotary_emb")
    on_disk = ("lm_head", *(f"model.layers.{layer_idx}" for layer_idx in range(num_layers)))
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint,
        trust_remote_code=False,
        dtype=torch.bfloat16,
        device_map=dict.fromkeys(kept, "cpu") | dict.fromkeys(on_disk, "disk"),
        offload_folder=str(checkpoint / "peers" / "accelerate"),
    )
    return transformers_like(model.eval())


def open_airllm(checkpoint: Path, _: int) -> Generate:
    """AirLLM, which cuts the checkpoint into a file per layer, in a directory of its own."""
    from airllm import AutoModel

    copies = str(checkpoint / "peers" / "airllm")
    model = AutoModel.from_pretrained(
        str(checkpoint), device="cpu", layer_shards_saving_path=copies
    )
    return transformers_like(model)


def open_ollm_1(checkpoint: Path, _: int) -> Generate:
    """The predecessor of this project."""
    from ollm import AutoInference

    return transformers_like(AutoInference(str(checkpoint), device="cpu", logging=False).model)


def open_llamacpp(checkpoint: Path, num_tokens: int) -> Generate:
    """llama.cpp with mapped weights, its default, a thread a core, the prompt in one batch."""
    from llama_cpp import Llama

    num_threads = len(os.sched_getaffinity(0))
    batch = max(512, num_tokens)  # its default is the first
    model = Llama(
        str(checkpoint / "peers" / "model-bf16.gguf"),
        n_ctx=max(512, num_tokens),
        n_batch=batch,
        n_ubatch=batch,
        n_threads=num_threads,
        n_threads_batch=num_threads,
        verbose=False,
    )

    def generate(prompt: list[int], num_new_tokens: int, dropping: ColdFiles) -> Timing[Counts]:
        dropping()
        timing: Timing[Counts] = Timing(time.perf_counter())
        for token in model.generate(prompt, temp=0.0):
            timing.ends.append(time.perf_counter())
            timing.tokens.append(token)
            timing.snapshots.append(Counts.now())
            dropping()
            timing.starts.append(time.perf_counter())
            if len(timing.tokens) == num_new_tokens:
                break
        return timing

    return generate


# By name: what opens a checkpoint for so many tokens, prompt and answer.
OPEN: Mapping[str, Callable[[Path, int], Generate]] = MappingProxyType(
    {
        "accelerate": open_accelerate,
        "airllm": open_airllm,
        "ollm-1": open_ollm_1,
        "llamacpp": open_llamacpp,
        "llamacpp-avx2": open_llamacpp,
    }
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time one peer on one checkpoint, cold.")
    parser.add_argument("peer", choices=OPEN)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("prompt", type=Path, nargs="?", help="JSON file with token ids")
    parser.add_argument("--new", type=int, default=6, help="new tokens, at least 2")
    parser.add_argument("--prepare", action="store_true", help="make the peer's copy, if any")
    args = parser.parse_args()
    with contextlib.redirect_stdout(sys.stderr), PeakAnonymousMemory() as anonymous:
        prompt = json.loads(args.prompt.read_text()) if args.prompt else []
        generate = OPEN[args.peer](args.checkpoint, len(prompt) + args.new)  # prints what it likes
        if args.prepare:
            return
        files = [path for path in args.checkpoint.rglob("*") if path.is_file()]
        dropping, before = ColdFiles(files), Counts.now()
        timing = generate(prompt, args.new, dropping)
    counts = [before, *timing.snapshots]
    print(json.dumps(told(args.peer, len(prompt), timing, counts, dropping, anonymous.num_bytes)))


if __name__ == "__main__":
    main()
