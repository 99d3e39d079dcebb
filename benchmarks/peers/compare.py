"""Ours and the peers on one model larger than memory: cold, in turns, under the same cap.

usage: compare.py [CHECKPOINT] [--peers llamacpp,airllm] [--rounds 2] [--cap 1500] [--json FILE]
                  [--plot FILE.png]

Without CHECKPOINT, the random Llama of 2.57 GB in models/random-llama, written if it is not there;
another must be of make_checkpoint.py too. Peers are installed into .peers, each into an environment
of its own, the first time (llama.cpp is compiled). All get the same 128 token ids and give 6 new
tokens, in a memory cgroup (capped.sh; root) that counts the page cache. Files are dropped from it
before every weight pass, and the disk is probed on the program's own files before each run.

A peer that cannot be installed or fails is told in one line and recorded, and the others go on. The
exit code is 1 if tokens differ, if ours failed, or if there was no peer to compare with.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks import MODELS, RESULTS, ROOT
from benchmarks.disk.disk import probe
from benchmarks.peers.copies import prepare
from benchmarks.peers.environments import PEERS, BuildError, versions
from benchmarks.peers.plot import draw
from benchmarks.peers.programs import Program, environ, program_of
from benchmarks.tools.children import ChildError, result_of, script
from benchmarks.tools.cold import checkpoint_files, drop_from_cache
from benchmarks.tools.measure import environment, random_prompt

OURS = "ollm-core"
SECONDS = 900
"""After which a run is given up."""
NEEDED = ("prefill_s", "decode_tok_s", "decode_gb_s", "cpu_s", "peak_anon_mb", "tokens")


def compete(
    programs: Sequence[Program],
    directory: Path,
    *,
    rounds: int,
    cap: int | None,
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, str]]:
    """The runs of each program, A B C, A B C, and why some failed. Those are not run again.

    Before each run every file in `directory` is dropped from the page cache.
    """
    runs: dict[str, list[dict[str, Any]]] = {program.name: [] for program in programs}
    failed: dict[str, str] = {}
    for number in range(rounds):
        for program in programs:
            if program.name in failed:
                continue
            drop_from_cache(path for path in directory.rglob("*") if path.is_file())
            limit = probe(program.files).gb_per_second
            with tempfile.TemporaryFile("w+") as errors:
                try:
                    run = result_of(
                        program.command, cap=cap, seconds=SECONDS, environ=environ(), errors=errors
                    )
                    if missing := [name for name in NEEDED if name not in run]:
                        raise ChildError(f"its line lacks {', '.join(missing)}")
                except ChildError as error:
                    failed[program.name] = str(error)
                    say(f"{program.title} failed: {error}")
                    continue
            run["disk_limit_gb_s"] = round(limit, 3)
            run["share_of_limit"] = round(run["decode_gb_s"] / limit, 3)
            run["load_average"] = round(os.getloadavg()[0], 2)
            runs[program.name].append(run)
            say(f"round {number + 1}, {program.title}: {run['decode_tok_s']:.3g} tokens/s")
    return {name: found for name, found in runs.items() if found}, failed


def odd_ones(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """The programs with a run whose tokens are not those of the first program's first run."""
    first = next((found[0]["tokens"] for found in runs.values()), None)
    return [name for name, found in runs.items() if any(run["tokens"] != first for run in found)]


def ratios(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, list[float]]]:
    """How many times as fast ours was as each peer, round by round."""
    found = {}
    for name, theirs in runs.items():
        if name == OURS or OURS not in runs:
            continue
        pairs = list(zip(runs[OURS], theirs, strict=False))
        found[name] = {
            "decode": [round(a["decode_tok_s"] / b["decode_tok_s"], 3) for a, b in pairs],
            "prefill": [round(b["prefill_s"] / a["prefill_s"], 3) for a, b in pairs],
        }
    return found


def bounds(
    runs: Mapping[str, Sequence[Mapping[str, Any]]], pass_bytes: int, cap: int | None
) -> dict[str, float]:
    """Tokens/s of the disk alone at the mean probed rate: when each pass reads all `pass_bytes`,
    and when as much of them is kept as the cap can hold, without any program beside them.
    """
    rates = [run["disk_limit_gb_s"] for found in runs.values() for run in found]
    rate = 1e9 * mean(rates or [0.0])
    told = {"disk_gb_s": round(rate / 1e9, 3), "nothing_kept_tok_s": round(rate / pass_bytes, 4)}
    if cap and pass_bytes > cap << 20:
        told["cap_full_tok_s"] = round(rate / (pass_bytes - (cap << 20)), 4)
    return told


def summary(
    runs: Mapping[str, Sequence[Mapping[str, Any]]],
    failed: Mapping[str, str],
    titles: Mapping[str, str],
    weight_bytes: tuple[int, int],
    cap: int | None,
) -> dict[str, Any]:
    """What is told of the runs. `weight_bytes` are those of the model, and of them what every pass
    reads.
    """
    return {
        "ours": OURS,
        "cap_mib": cap,
        "weight_bytes": weight_bytes[0],
        "pass_bytes": weight_bytes[1],
        "titles": titles,
        "failed": failed,
        "ratios": ratios(runs),
        "bounds": bounds(runs, weight_bytes[1], cap),
        "other_tokens": odd_ones(runs),
        "runs": runs,
    }


def table(record: Mapping[str, Any]) -> str:
    """Means over the rounds, for people."""
    rows = [
        f"{'':28}{'decode':>8}{'ours is':>14}{'prefill':>9}{'read':>7}{'of disk':>9}"
        f"{'CPU':>8}{'anonymous':>11}",
        f"{'':28}{'tok/s':>8}{'faster':>14}{'s':>9}{'GB/s':>7}{'limit':>9}{'s':>8}{'MiB':>11}",
    ]
    for name, runs in record["runs"].items():

        def average(key: str, runs: Sequence[Mapping[str, Any]] = runs) -> float:
            return mean(run[key] for run in runs)

        span = ""
        if found := record["ratios"].get(name, {}).get("decode"):
            span = " to ".join(f"{ratio:.1f}" for ratio in sorted({min(found), max(found)})) + "x"
        rows.append(
            f"{record['titles'][name]:28}{average('decode_tok_s'):8.3f}{span:>14}"
            f"{average('prefill_s'):9.1f}{average('decode_gb_s'):7.2f}"
            f"{average('share_of_limit'):9.0%}{average('cpu_s'):8.1f}{average('peak_anon_mb'):11.0f}"
        )
    rows += [f"{record['titles'][name]:28}failed: {why}" for name, why in record["failed"].items()]
    limits = record["bounds"]
    rows.append(
        f"the disk alone, {limits['disk_gb_s']:.2f} GB/s: {limits['nothing_kept_tok_s']:.2f} "
        "tokens/s if nothing is kept in memory"
        + (
            f", {limits['cap_full_tok_s']:.2f} if the whole cap holds weights"
            if "cap_full_tok_s" in limits
            else ""
        )
    )
    return "\n".join(rows)


def conclude(record: Mapping[str, Any], json_file: Path, picture: Path) -> int:
    """Tell, write and draw what was found; the exit code."""
    json_file.write_text(json.dumps(record, indent=1) + "\n")
    say(f"record: {json_file}")
    if record["runs"]:
        print(table(record))
        draw(record, picture)
        say(f"picture: {picture}")
    if OURS in record["failed"]:
        say("error: ours failed")
        return 1
    if len(record["runs"]) == 1:
        say("error: no peer could be run, so nothing is compared")
        return 1
    if odd := record["other_tokens"]:
        say(f"error: other tokens than those of {OURS} came from {', '.join(odd)}")
        return 1
    say("all gave the same tokens")
    return 0


def say(text: str) -> None:
    """To people, at once."""
    print(text, file=sys.stderr, flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Ours and the peers on a model beyond memory.")
    parser.add_argument("checkpoint", type=Path, nargs="?", default=MODELS / "random-llama")
    parser.add_argument("--peers", default=",".join(PEERS), help=f"of {', '.join(PEERS)}")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--cap", type=int, default=1500, help="MiB for each run; 0: no cap")
    parser.add_argument("--device-memory", default="1200MB", help="ours, inside the cap")
    parser.add_argument("--prompt", type=int, default=128, help="prompt tokens, at most 500")
    parser.add_argument("--new", type=int, default=6, help="new tokens, 2 to 12")
    parser.add_argument("--environments", type=Path, default=ROOT / ".peers")
    parser.add_argument("--json", type=Path, help="record; default: results/peers-cpu-DATE.json")
    parser.add_argument("--plot", type=Path, help="picture; default: results/peers-cpu.png")
    args = parser.parse_args()
    args.peers = [name for name in args.peers.split(",") if name]
    if unknown := set(args.peers) - PEERS.keys():
        parser.error(f"no such peer: {', '.join(sorted(unknown))}; there are {', '.join(PEERS)}")
    if args.rounds < 1 or not 1 <= args.prompt <= 500 or not 2 <= args.new <= 12:
        parser.error("--rounds, --prompt or --new is out of range")
    if args.cap and os.geteuid():
        parser.error("a memory cgroup needs root; hint: sudo make bench-peers, or --cap 0")
    return args


def main() -> int:
    args = parse()
    checkpoint = args.checkpoint.resolve()
    prepare(checkpoint, say)
    prompt = checkpoint / "peers" / "prompt.json"
    prompt.write_text(json.dumps(random_prompt(args.prompt)[0].tolist()))
    ours = [*script("decode"), str(checkpoint)]
    for name in ("prompt", "new", "device_memory"):
        ours += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    programs = [Program(OURS, "oLLM-core (ours)", ours, checkpoint_files(checkpoint))]
    found, unusable = {}, {}
    for name in args.peers:
        peer = PEERS[name]
        try:
            program = program_of(peer, checkpoint, prompt, args.new, args.environments, say)
        except BuildError as error:
            unusable[name] = str(error)
            say(f"{peer.title} cannot be run: {error}")
        else:
            programs.append(program)
            found[name] = versions(peer, Path(program.command[0]))
    os.sync()  # what is not yet on the disk cannot be dropped from the page cache
    runs, failed = compete(programs, checkpoint, rounds=args.rounds, cap=args.cap)
    config = json.loads((checkpoint / "config.json").read_text())
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
    weight_bytes = index["metadata"]["total_size"]
    embedding_bytes = 2 * config["vocab_size"] * config["hidden_size"]  # rows of it are read
    machine = environment(checkpoint)
    record = {
        **machine,
        "cache": "dropped before every weight pass",
        "device_memory": args.device_memory,
        "prompt_tokens": args.prompt,
        "new_tokens": args.new,
        "peer_versions": found,
        **summary(
            runs,
            unusable | failed,
            {OURS: programs[0].title} | {name: PEERS[name].title for name in args.peers},
            (weight_bytes, weight_bytes - embedding_bytes),
            args.cap,
        ),
    }
    return conclude(
        record,
        args.json or RESULTS / f"peers-cpu-{machine['date']}.json",
        args.plot or RESULTS / "peers-cpu.png",
    )


if __name__ == "__main__":
    sys.exit(main())
