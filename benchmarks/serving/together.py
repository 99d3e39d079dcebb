"""Many requests that share weight passes, against the same ones one after another.

usage: together.py [CHECKPOINT] [--questions 16 --document 8192 | --rows 32] [--new 16]
                   [--alone 3] [--throttle 1.0] [--cap 1500] [--peers llamacpp,accelerate]
                   [--rounds 1] [--slow-reading] [--json FILE]

Without CHECKPOINT, the random Llama of 2.57 GB in models/random-llama, written if it is not there.
`--questions` are asked about one document. Before, a first process reads it for another question
and keeps it on disk, and a second process asks one more: the time to the first token of both.
`--rows` have nothing in common. Each answer is greedy, of `--new` tokens, and its tokens must be
the same alone and beside others (in float32; in bfloat16 rounding may choose another, which is
told). One after another, `--alone` of them are run and the rate is theirs: they are alike. The
host's memory holds the KV of 32 rows: a block of 256 tokens each.

Each measurement is a process of its own, under the cap of memory, which counts the page cache, and
with the disk throttled to so many GB/s by the kernel (0: not throttled; both need root). The first
two processes are not throttled, or both with `--slow-reading`. A peer of `--peers` generates what
`--rows` are, one, and all in one batch, cold before every pass, with the same throttle.

The last line on stdout is the record as JSON; the report for people goes to stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import ollm
from benchmarks import MODELS, ROOT
from benchmarks.peers.compare import say
from benchmarks.peers.copies import prepare
from benchmarks.peers.environments import PEERS
from benchmarks.peers.programs import environ, program_of
from benchmarks.tools.children import ChildError, result_of, script
from benchmarks.tools.cold import drop_from_cache
from benchmarks.tools.measure import environment, finish, memory_cap, read_from_storage
from benchmarks.tools.throttle import throttled
from ollm_core.serving.request import Request, SamplingParams

SHORTEST, LONGEST = 20, 60
"""Tokens of a question."""
PROMPT = 128
"""Tokens of a row."""
SECONDS = 3600
MEASURED = ("first", "second", "together", "alone")
RECORDED = ("questions", "document", "rows", "new", "alone", "throttle", "slow_reading", "cap")
"""Arguments that stand in the record."""


def prompts(args: argparse.Namespace) -> list[list[int]]:
    """The token ids of every request: the same everywhere, all below 49,000. On a document, those
    of the first and the second process come last.
    """
    generator = torch.Generator().manual_seed(0)

    def tokens(number: int) -> list[int]:
        return torch.randint(10, 49000, (number,), generator=generator).tolist()

    if args.rows:
        return [tokens(PROMPT) for _ in range(args.rows)]
    document, last = tokens(args.document), max(args.questions - 1, 1)
    lengths = [SHORTEST + (LONGEST - SHORTEST) * number // last for number in range(args.questions)]
    lengths += [LONGEST, LONGEST]  # of the first and the second process
    return [document + tokens(length) for length in lengths]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """One measurement in this process: the `first` question on the document, or the `second`, all
    `together`, or each `alone`.
    """
    wanted = SamplingParams(
        temperature=0.0, max_tokens=args.new, min_tokens=args.new, ignore_eos=True
    )
    texts, is_fast = prompts(args), False
    num_asked = args.rows or args.questions
    asked = [Request(token_ids=ids, wanted=wanted, keep=False) for ids in texts[:num_asked]]
    if args.child in ("first", "second"):
        is_fast = not args.slow_reading
        once = SamplingParams(temperature=0.0, max_tokens=1)
        ids = texts[num_asked + (args.child == "second")]
        asked = [Request(token_ids=ids, wanted=once)]
    options: dict[str, Any] = {"kv": "disk", "kv_dir": args.kv_dir} if args.kv_dir else {}
    with ollm.load(
        args.checkpoint,
        device="cpu",
        device_memory=args.device_memory,
        host_memory=args.host_memory,
        dtype=args.dtype,
        **options,
    ) as model:
        groups = [[one] for one in asked[: args.alone]] if args.child == "alone" else [asked]
        found, seconds = [], []
        with throttled(args.checkpoint, 0 if is_fast else int(args.throttle * 1e9)):
            before, bytes_before = model.stats, read_from_storage()
            for group in groups:
                start = time.perf_counter()
                found += [answers[0] for answers in model.answer(group)]
                seconds.append(time.perf_counter() - start)
            after, bytes_after = model.stats, read_from_storage()
    return {
        "seconds": [round(one, 2) for one in seconds],
        "prefill_seconds": round(max(one.counts.prefill_seconds for one in found), 2),
        "new_tokens": sum(len(one.token_ids) for one in found),
        "tokens_per_second": round(sum(len(one.token_ids) for one in found) / sum(seconds), 4),
        "cached_tokens": [one.counts.num_cached_tokens for one in found],
        "weight_passes": after.weight_passes - before.weight_passes,
        "weight_bytes_read": after.weight_bytes_read - before.weight_bytes_read,
        "storage_bytes_read": bytes_after - bytes_before,
        "device_peak_bytes": after.device_peak_bytes,
        "memory_cap_bytes": memory_cap(),
        "load_average": round(os.getloadavg()[0], 2),
        "tokens": [one.token_ids for one in found],
    }


def child(args: argparse.Namespace, what: str, kv_dir: Path | None) -> dict[str, Any]:
    """A measurement in a process of its own."""
    command = [*script("together"), str(args.checkpoint), "--child", what]
    if args.slow_reading:
        command += ["--slow-reading"]
    for name in ("new", "alone", "throttle", "dtype", "device_memory", "host_memory"):
        command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    if args.rows:
        command += ["--rows", str(args.rows)]
    else:
        command += ["--questions", str(args.questions), "--document", str(args.document)]
    if kv_dir:
        command += ["--kv-dir", str(kv_dir)]
    drop_from_cache(args.checkpoint.glob("*.safetensors"))
    return result_of(command, cap=args.cap, seconds=SECONDS)


def ours(args: argparse.Namespace, kv_dir: Path | None) -> list[dict[str, Any]]:
    """Together and alone in turns."""
    rounds = []
    for number in range(args.rounds):
        run: dict[str, Any] = {}
        if number == 0 and kv_dir:
            first, second = (child(args, what, kv_dir) for what in ("first", "second"))
            share = round(second["seconds"][0] / first["seconds"][0], 4)
            run |= {"first": first, "second": second, "second_to_first": share}
            say(
                f"first token of the first process after {first['seconds'][0]:.1f} s, of the "
                f"second after {second['seconds'][0]:.2f} s: {share:.1%}"
            )
        run |= {what: child(args, what, kv_dir) for what in ("together", "alone")}
        together, alone = run["together"], run["alone"]
        run["same_tokens"] = together["tokens"][: len(alone["tokens"])] == alone["tokens"]
        run["times"] = round(together["tokens_per_second"] / alone["tokens_per_second"], 2)
        rounds.append(run)
        say(
            f"together {together['tokens_per_second']:.2f} tokens/s in "
            f"{together['weight_passes']} passes, one after another "
            f"{alone['tokens_per_second']:.3f}: {run['times']:.1f} times, "
            f"tokens {'the same' if run['same_tokens'] else 'DIFFERENT'}"
        )
    return rounds


def theirs(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """A peer's runs: one row, and all in a batch if it can."""
    peer = PEERS[name]
    prompt = args.checkpoint / "peers" / "rows.json"
    rows = prompts(args)
    found: dict[str, Any] = {"title": peer.title}
    for batch in (1, len(rows)):
        prompt.write_text(json.dumps(rows if batch > 1 else rows[0]))
        program = program_of(peer, args.checkpoint, prompt, args.new, ROOT / ".peers", say)
        command = [*program.command, "--throttle", str(args.throttle)]
        os.sync()
        drop_from_cache(path for path in args.checkpoint.rglob("*") if path.is_file())
        try:
            with tempfile.TemporaryFile("w+") as errors:  # llama.cpp says thousands of lines
                run = result_of(
                    command, cap=args.cap, seconds=SECONDS, environ=environ(), errors=errors
                )
        except ChildError as error:
            found[f"batch {batch}"] = {"failed": str(error)}
            say(f"{peer.title}, batch of {batch}: {error}")
            continue
        seconds = run["prefill_s"] + (run["new"] - 1) / run["decode_tok_s"]
        run["tokens_per_second"] = round(batch * run["new"] / seconds, 4)
        found[f"batch {batch}"] = run
        say(f"{peer.title}, batch of {batch}: {run['tokens_per_second']:.3f} tokens/s")
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("checkpoint", type=Path, nargs="?", default=MODELS / "random-llama")
    parser.add_argument("--questions", type=int, default=16)
    parser.add_argument("--document", type=int, default=8192, help="tokens of the document")
    parser.add_argument("--rows", type=int, default=0, help="independent rows, no document")
    parser.add_argument("--new", type=int, default=16, help="tokens of each answer")
    parser.add_argument("--alone", type=int, default=3, help="requests run one after another")
    parser.add_argument("--throttle", type=float, default=1.0, help="GB/s; 0: none")
    parser.add_argument(
        "--slow-reading", action="store_true", help="throttle the first two processes, too"
    )
    parser.add_argument("--cap", type=int, default=1500, help="MiB, page cache included; 0: none")
    parser.add_argument("--device-memory", default="700MB")
    parser.add_argument("--host-memory", default="500MB")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--peers", default="", help=f"with --rows, of {', '.join(PEERS)}")
    parser.add_argument("--json", type=Path, help="write the record to this file")
    parser.add_argument(
        "--child", choices=("first", "second", "together", "alone"), help=argparse.SUPPRESS
    )
    parser.add_argument("--kv-dir", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.peers = [name for name in args.peers.split(",") if name]
    if args.peers and (not args.rows or args.peers[0] not in PEERS):
        parser.error(f"--peers goes with --rows; there are {', '.join(PEERS)}")
    if (args.cap or args.throttle) and os.geteuid():
        parser.error("a cap and a throttle need root; hint: --cap 0 --throttle 0")
    return args


def main() -> None:
    args = parse()
    args.checkpoint = args.checkpoint.resolve()
    if args.child:
        finish(measure(args), None)
        return
    prepare(args.checkpoint, say)
    directory = None if args.rows else Path(tempfile.mkdtemp(dir=args.checkpoint.parent))
    try:
        rounds = ours(args, directory)
    finally:
        if directory:
            shutil.rmtree(directory)
    record = {
        **environment(args.checkpoint),
        "cache": "under the cap; dropped before each measurement",
        **{
            name: getattr(args, name)
            for name in (
                "questions",
                "document",
                "rows",
                "new",
                "alone",
                "throttle",
                "slow_reading",
                "cap",
            )
        },
        "rounds": rounds,
        "peers": {name: theirs(args, name) for name in args.peers},
    }
    finish(record, args.json)


if __name__ == "__main__":
    main()
