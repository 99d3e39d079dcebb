"""Prefill by the prompt's length, ours beside llama.cpp's: cold, in turns, under the same cap.

usage: by_length.py [CHECKPOINT] [--prompts 128,512,2048] [--avx2] [--cap 1500] [--rounds 2]
                    [--json FILE] [--plot FILE.png]

The checkpoint, the environment of llama.cpp and the cap are those of compare.py. llama.cpp reads
each prompt in one batch, however long, so that it too reads the weights once. --avx2 limits our
libraries to AVX2 and compiles llama.cpp for it (an environment of its own).

The last line on stdout is the record as JSON; the report for people goes to stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.figure import Figure

from benchmarks import MODELS, ROOT
from benchmarks.peers.compare import OURS, compete, odd_ones, ratios, say
from benchmarks.peers.copies import prepare
from benchmarks.peers.environments import LLAMACPP_AVX2, PEERS, BuildError
from benchmarks.peers.programs import Program, program_of
from benchmarks.tools.children import script
from benchmarks.tools.cold import checkpoint_files
from benchmarks.tools.instructions import AVX2
from benchmarks.tools.measure import environment, finish, random_prompt


def of_length(args: argparse.Namespace, checkpoint: Path, num_tokens: int) -> dict[str, Any]:
    """The runs of both programs with a prompt of `num_tokens`, and how they compare.

    Raises BuildError.
    """
    prompt = checkpoint / "peers" / f"prompt-{num_tokens}.json"
    prompt.write_text(json.dumps(random_prompt(num_tokens)[0].tolist()))
    ours = [*script("decode"), str(checkpoint), "--device-memory", args.device_memory]
    ours += ["--prompt", str(num_tokens), "--new", str(args.new), "--attention", args.attention]
    peer = LLAMACPP_AVX2 if args.avx2 else PEERS["llamacpp"]
    programs = [
        Program(OURS, "oLLM-core", ours, checkpoint_files(checkpoint)),
        program_of(peer, checkpoint, prompt, args.new, args.environments, say),
    ]
    os.sync()  # what is not yet on the disk cannot be dropped from the page cache
    say(f"{num_tokens} tokens:")
    runs, failed = compete(programs, checkpoint, rounds=args.rounds, cap=args.cap)
    for name, found in runs.items():
        seconds = ", ".join(f"{run['prefill_s']:.2f}" for run in found)
        say(f"  {name}: prefill {seconds} s")
    return {
        "failed": failed,
        "ratios": next(iter(ratios(runs).values()), {}),
        "other_tokens": odd_ones(runs),
        "runs": runs,
    }


def draw(record: Mapping[str, Any], path: Path) -> None:
    """Seconds of both programs by the prompt's length, with a line from the origin through the
    longest of ours.
    """
    figure = Figure(figsize=(8, 4.6), dpi=130, layout="constrained")
    axes = figure.subplots()
    for name, title, colour in ((OURS, "oLLM-core", "#2b6cb0"), ("", "llama.cpp", "#718096")):
        points = {
            int(length): mean(run["prefill_s"] for run in runs)
            for length, found in record["prompts"].items()
            for program, runs in found["runs"].items()
            if (program == OURS) == bool(name)
        }
        axes.plot([*points], [*points.values()], "o-", label=title, color=colour)
    axes.set_xlabel("tokens of the prompt")
    axes.set_ylabel("prefill, seconds (lower is better)")
    axes.set_xlim(0)
    axes.set_ylim(0)
    axes.legend()
    axes.spines[["top", "right"]].set_visible(False)
    limit = "limited to AVX2" if record["avx2"] else "all its instructions"
    axes.set_title(
        f"Prefill of a 2.57 GB model in {record['cap_mib']} MiB of memory, cold\n"
        f"{record['machine']['cpu']}, {record['machine']['cores']} cores, {limit}",
        fontsize=10,
    )
    figure.savefig(path)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Prefill by length, beside llama.cpp.")
    parser.add_argument("checkpoint", type=Path, nargs="?", default=MODELS / "random-llama")
    parser.add_argument("--prompts", default="128,512,2048", help="tokens of each prompt")
    parser.add_argument("--avx2", action="store_true", help="nothing beyond AVX2, on both sides")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--cap", type=int, default=1500, help="MiB for each run; 0: no cap")
    parser.add_argument("--device-memory", default="1100MB", help="ours, inside the cap")
    parser.add_argument("--attention", default="auto", help="ours")
    parser.add_argument("--new", type=int, default=3, help="new tokens, at least 2")
    parser.add_argument("--environments", type=Path, default=ROOT / ".peers")
    parser.add_argument("--json", type=Path, help="write the record to this file")
    parser.add_argument("--plot", type=Path, help="draw it into this file")
    args = parser.parse_args()
    if args.cap and os.geteuid():
        parser.error("a memory cgroup needs root; hint: use sudo, or --cap 0")
    return args


def main() -> None:
    args = parse()
    checkpoint = args.checkpoint.resolve()
    prepare(checkpoint, say)
    if args.avx2:
        os.environ.update(AVX2)  # of the children; nothing is computed here
    try:
        prompts = {
            length: of_length(args, checkpoint, int(length)) for length in args.prompts.split(",")
        }
    except BuildError as error:
        sys.exit(f"error: llama.cpp cannot be run: {error}")
    record = {
        **environment(checkpoint),
        "cache": "dropped before every weight pass",
        "avx2": args.avx2,
        "cap_mib": args.cap,
        "device_memory": args.device_memory,
        "attention": args.attention,
        "prompts": prompts,
    }
    if args.plot:
        draw(record, args.plot)
    for length, found in prompts.items():
        if pairs := found["ratios"]:
            say(f"{length:>6} tokens: prefill {pairs['prefill']}, decode {pairs['decode']} times")
    finish(record, args.json)


if __name__ == "__main__":
    main()
