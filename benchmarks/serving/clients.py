"""Clients of one server at once, against one alone and against the library without a server.

usage: clients.py [CHECKPOINT] [--clients 8] [--prompt 64] [--new 16] [--throttle 1.0]
                  [--cap 1500] [--json FILE]

Without CHECKPOINT, the random Llama of 2.57 GB in models/random-llama, written if it is not there.
Each client asks for a completion of its own prompt, greedily and as a stream; the text must be the
same alone and beside others (in bfloat16 rounding may choose another, which is told). The server
has `--cap` MiB of memory, page cache included, and reads the disk at `--throttle` GB/s (0: as fast
as it is; both need root).

What a server adds to a pass is the median time between two tokens of one client, against that of
the library under the same limits.

The last line on stdout is the record as JSON; the report for people goes to stderr.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

import ollm
from benchmarks import MODELS
from benchmarks.peers.compare import say
from benchmarks.peers.copies import prepare
from benchmarks.serving.server import Streamed, serving, stream
from benchmarks.tools.children import result_of, script
from benchmarks.tools.cold import drop_from_cache
from benchmarks.tools.measure import environment, finish
from benchmarks.tools.throttle import throttled
from ollm_core.serving.request import NewToken, Request, SamplingParams

SECONDS = 1200


def prompts(args: argparse.Namespace) -> list[list[int]]:
    """The token ids of each client's: the same everywhere."""
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randint(10, 49000, (args.clients, args.prompt), generator=generator)
    return [list(map(int, row)) for row in drawn]


def library(args: argparse.Namespace) -> dict[str, Any]:
    """The first client's prompt, in this process, without a server."""
    wanted = SamplingParams(
        temperature=0.0, max_tokens=args.new, min_tokens=args.new, ignore_eos=True
    )
    times: list[float] = []

    def note(event: object) -> None:
        if isinstance(event, NewToken):
            times.append(time.perf_counter())

    with (
        ollm.load(args.checkpoint, device="cpu", **limits(args)) as model,
        throttled(args.checkpoint, int(args.throttle * 1e9)),
    ):
        model.answer([Request(token_ids=prompts(args)[0], wanted=wanted)], on_event=note)
    return {"token_seconds": [b - a for a, b in itertools.pairwise(times)]}


def limits(args: argparse.Namespace) -> dict[str, str]:
    """What the library may hold, inside the cap."""
    return {"device_memory": args.device_memory, "host_memory": args.host_memory}


def asked(args: argparse.Namespace, prompt: list[int]) -> dict[str, Any]:
    """The body of a client."""
    exact = {"min_tokens": args.new, "ignore_eos": True, "temperature": 0}
    return {"model": "any", "prompt": prompt, "max_tokens": args.new, **exact}


def at_once(args: argparse.Namespace, number: int) -> tuple[list[Streamed], float]:
    """The first `number` clients of a server that has just started; -> what each got, and the
    seconds until all had it.
    """
    drop_from_cache(args.checkpoint.glob("*.safetensors"))
    options = ["--device", "cpu"]
    for name, value in limits(args).items():
        options += [f"--{name.replace('_', '-')}", value]
    throttle = int(args.throttle * 1e9)
    with (
        serving(args.checkpoint, options, cap=args.cap, throttle=throttle) as server,
        ThreadPoolExecutor(number) as pool,
    ):
        began = time.perf_counter()
        bodies = [asked(args, prompt) for prompt in prompts(args)[:number]]
        found = list(pool.map(lambda body: stream(server, "/v1/completions", body), bodies))
        return found, time.perf_counter() - began


def told(found: list[Streamed], seconds: float) -> dict[str, Any]:
    """For the record."""
    num_new = sum(one.completion_tokens for one in found)
    return {
        "seconds": round(seconds, 2),
        "new_tokens": num_new,
        "tokens_per_second": round(num_new / seconds, 4),
        "first_byte_seconds": [round(one.first_byte_seconds, 3) for one in found],
        "first_token_seconds": [round(one.token_seconds[0], 2) for one in found],
        "step_seconds": [round(b - a, 4) for a, b in itertools.pairwise(found[0].token_seconds)],
        "texts": [one.text for one in found],
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("checkpoint", type=Path, nargs="?", default=MODELS / "random-llama")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each")
    parser.add_argument("--new", type=int, default=16, help="tokens of each answer")
    parser.add_argument("--throttle", type=float, default=1.0, help="GB/s; 0: none")
    parser.add_argument("--cap", type=int, default=1500, help="MiB, page cache included; 0: none")
    parser.add_argument("--device-memory", default="700MB")
    parser.add_argument("--host-memory", default="400MB")
    parser.add_argument("--json", type=Path, help="write the record to this file")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if (args.cap or args.throttle) and os.geteuid():
        parser.error("a cap and a throttle need root; hint: --cap 0 --throttle 0")
    return args


def main() -> None:
    args = parse()
    args.checkpoint = args.checkpoint.resolve()
    if args.child:
        finish(library(args), None)
        return
    prepare(args.checkpoint, say)
    drop_from_cache(args.checkpoint.glob("*.safetensors"))
    command = [*script("clients"), str(args.checkpoint), "--child"]
    for name in ("clients", "prompt", "new", "throttle", "device_memory", "host_memory"):
        command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    without = result_of(command, cap=args.cap, seconds=SECONDS)
    one = told(*at_once(args, 1))
    several = told(*at_once(args, args.clients))
    pass_seconds = statistics.median(without["token_seconds"])
    steps = statistics.median(one["step_seconds"])
    several["same_texts"] = several["texts"][0] == one["texts"][0]
    times = several["tokens_per_second"] / one["tokens_per_second"]
    say(
        f"one client {one['tokens_per_second']:.3f} tokens/s, {args.clients} at once "
        f"{several['tokens_per_second']:.3f}: {times:.2f} times, "
        f"text {'the same' if several['same_texts'] else 'DIFFERENT'}\n"
        f"a pass {pass_seconds:.3f} s, in the server {steps:.3f}: {steps / pass_seconds - 1:+.1%}\n"
        f"first byte after {max(several['first_byte_seconds']):.2f} s at most"
    )
    record = {
        **environment(args.checkpoint),
        "cache": "under the cap; dropped before each measurement",
        **{name: getattr(args, name) for name in ("clients", "prompt", "new", "throttle", "cap")},
        "one": one,
        "several": several,
        "times": round(times, 2),
        "pass_seconds": round(pass_seconds, 4),
        "server_pass_seconds": round(steps, 4),
        "load_average": round(os.getloadavg()[0], 2),
    }
    finish(record, args.json)


if __name__ == "__main__":
    main()
