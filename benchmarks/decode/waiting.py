"""How OpenMP's threads wait between operations, and what that costs beside other programs.

usage: waiting.py [--streamed CHECKPOINT] [--resident CHECKPOINT] [--others 0 1 2] [--rounds 2]
                  [--new 8] [--json FILE]

torch's threads wait for their next work by asking for it again and again, which on a core that
somebody else wants is time lost for both. Each setting of GNU OpenMP runs in a process of its own,
in turns, alone and beside so many processes that always compute: a model whose weights are
streamed (models/random-llama, see make_checkpoint.py, in 1,100 MB) and one that is all in memory
(models/smollm2-135M). A token's time is the median; all settings must give the same tokens.

The last line on stdout is the record as JSON; the report for people goes to stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import mean, median
from typing import Any

from benchmarks import MODELS
from benchmarks.tools.children import result_of, script

SETTINGS: Mapping[str, Mapping[str, str]] = {
    "default": {},
    "spin 100000": {"GOMP_SPINCOUNT": "100000"},
    "spin 20000": {"GOMP_SPINCOUNT": "20000"},
    "spin 4000": {"GOMP_SPINCOUNT": "4000"},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
}
PROMPT = 16
SECONDS = 300


def child(checkpoint: Path, device_memory: str, num_new: int) -> dict[str, Any]:
    """One run in this process."""
    import ollm
    from benchmarks.tools.measure import random_prompt, timed_generate

    with ollm.load(
        checkpoint, device="cpu", device_memory=device_memory, kv="device", reader="direct"
    ) as model:
        timing = timed_generate(
            model,
            random_prompt(PROMPT),
            num_new,
            snapshot=lambda: None,
            between_tokens=lambda: None,
            eos_token_id=None,
        )
        stats = model.stats
    return {
        "prefill_seconds": round(timing.prefill_seconds, 3),
        "token_seconds": round(median(timing.step_seconds), 4),
        "streamed_bytes": stats.weight_bytes - stats.resident_bytes,
        "tokens": timing.tokens,
    }


@contextmanager
def beside(others: int) -> Iterator[None]:
    """So many other processes compute all the time."""
    with ExitStack() as stack:
        for _ in range(others):
            other = stack.enter_context(
                subprocess.Popen([sys.executable, "-c", "while True: pass"])
            )
            stack.callback(other.kill)
        yield


def measured(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every run, told as it ends."""
    models = {"streamed": (args.streamed, "1100MB"), "resident": (args.resident, "2GB")}
    for number in range(args.rounds):
        for kind, (checkpoint, memory) in models.items():
            for others in args.others:
                for setting, variables in SETTINGS.items():
                    command = [*script("waiting"), "--child", str(checkpoint), memory]
                    with beside(others):
                        found = result_of(
                            [*command, "--new", str(args.new)],
                            seconds=SECONDS,
                            environ={**os.environ, **variables},
                        )
                    print(
                        f"round {number + 1}, {kind}, {others} others, {setting}: "
                        f"{found['token_seconds']:.3f} s a token, "
                        f"prompt {found['prefill_seconds']:.2f} s",
                        file=sys.stderr,
                        flush=True,
                    )
                    yield {"model": kind, "others": others, "setting": setting, **found}


def report(runs: list[dict[str, Any]]) -> bool:
    """Means for people; whether all gave the same tokens."""
    told: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for run in runs:
        told.setdefault((run["model"], run["others"], run["setting"]), []).append(run)
    for (kind, others, setting), same in told.items():
        rate = mean(1 / run["token_seconds"] for run in same)
        line = f"{kind:9} {others} others  {setting:12} {rate:7.2f} tokens/s"
        print(line, file=sys.stderr)
    tokens = {(run["model"], tuple(run["tokens"])) for run in runs}
    return len(tokens) == len({run["model"] for run in runs})


def main() -> None:
    parser = argparse.ArgumentParser(description="How OpenMP's threads wait, beside others.")
    parser.add_argument("--streamed", type=Path, default=MODELS / "random-llama")
    parser.add_argument("--resident", type=Path, default=MODELS / "smollm2-135M")
    parser.add_argument("--others", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--new", type=int, default=8, help="new tokens, at least 3")
    parser.add_argument("--json", type=Path, help="write the record to this file")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(Path(args.child[0]), args.child[1], args.new)))
        return
    from benchmarks.tools.measure import environment, finish

    runs = list(measured(args))
    same = report(runs)
    record = {**environment(args.streamed), "same_tokens": same, "runs": runs}
    finish(record, args.json)
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
