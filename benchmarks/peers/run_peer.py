"""Time one peer on one checkpoint, cold, on the CPU, in the environment that has the peer.

usage: run_peer.py PEER CHECKPOINT PROMPT [--new 6] [--throttle GB_PER_SECOND]
       run_peer.py PEER CHECKPOINT --prepare

PROMPT is a JSON file with a list of token ids, or with a list of such lists of one length, which
are then generated in one batch; the tokens that are told are the first row's. The checkpoint and
every copy of it that a peer makes lie in the directory CHECKPOINT and are dropped from the page
cache before every weight pass.
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
from benchmarks.tools.throttle import throttled

Generate = Callable[[list[list[int]], int, ColdFiles], Timing[Counts]]
"""Token ids of each row, all of one length; how many new ones each gets; what empties the cache."""


def transformers_like(model: Any) -> Generate:
    """Greedy tokens from a model with transformers' `generate`."""

    def generate(rows: list[list[int]], num_new_tokens: int, dropping: ColdFiles) -> Timing[Counts]:
        import torch

        from benchmarks.tools.measure import timed_generate

        return timed_generate(
            model,
            torch.tensor(rows),
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
    """llama.cpp with mapped weights, its default, a thread a core, the prompts in one batch."""
    import llama_cpp
    import numpy as np

    llama_cpp.llama_backend_init()
    path = str(checkpoint / "peers" / "model-bf16.gguf").encode()
    model = llama_cpp.llama_model_load_from_file(path, llama_cpp.llama_model_default_params())
    num_logits = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))

    def generate(rows: list[list[int]], num_new_tokens: int, dropping: ColdFiles) -> Timing[Counts]:
        num_threads = len(os.sched_getaffinity(0))
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = len(rows) * max(512, num_tokens)
        params.n_batch = params.n_ubatch = max(512, num_tokens * len(rows))  # 512: its default
        params.n_seq_max = len(rows)
        params.n_threads = params.n_threads_batch = num_threads
        context = llama_cpp.llama_init_from_model(model, params)

        def run(texts: list[list[int]], start: int) -> list[int]:
            """Each row's next token after these of it, which begin at position `start`."""
            batch = llama_cpp.llama_batch_init(sum(map(len, texts)), 0, 1)
            ends = []
            for row, text in enumerate(texts):
                for offset, token in enumerate(text):
                    number = batch.n_tokens
                    batch.token[number], batch.pos[number] = token, start + offset
                    batch.n_seq_id[number], batch.seq_id[number][0] = 1, row
                    batch.logits[number] = offset == len(text) - 1
                    batch.n_tokens += 1
                ends.append(batch.n_tokens - 1)
            if llama_cpp.llama_decode(context, batch):
                raise SystemExit("llama.cpp could not decode a batch")
            llama_cpp.llama_batch_free(batch)
            logits = (llama_cpp.llama_get_logits_ith(context, end) for end in ends)
            return [int(np.ctypeslib.as_array(one, (num_logits,)).argmax()) for one in logits]

        dropping()
        timing: Timing[Counts] = Timing(time.perf_counter())
        texts, start = rows, 0
        while len(timing.tokens) < num_new_tokens:
            chosen = run(texts, start)
            timing.ends.append(time.perf_counter())
            timing.tokens.append(chosen[0])
            timing.snapshots.append(Counts.now())
            dropping()
            timing.starts.append(time.perf_counter())
            texts, start = [[token] for token in chosen], start + len(texts[0])
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
    parser.add_argument("--throttle", type=float, default=0, help="GB/s of the disk (root)")
    parser.add_argument("--prepare", action="store_true", help="make the peer's copy, if any")
    args = parser.parse_args()
    with contextlib.redirect_stdout(sys.stderr), PeakAnonymousMemory() as anonymous:
        prompt = json.loads(args.prompt.read_text()) if args.prompt else [[]]
        rows = prompt if isinstance(prompt[0], list) else [prompt]
        num_tokens = len(rows[0]) + args.new
        generate = OPEN[args.peer](args.checkpoint, num_tokens)  # prints what it likes
        if args.prepare:
            return
        files = [path for path in args.checkpoint.rglob("*") if path.is_file()]
        with throttled(args.checkpoint, int(args.throttle * 1e9)):
            dropping, before = ColdFiles(files), Counts.now()
            timing = generate(rows, args.new, dropping)
    counts = [before, *timing.snapshots]
    print(json.dumps(told(args.peer, len(rows[0]), timing, counts, dropping, anonymous.num_bytes)))


if __name__ == "__main__":
    main()
