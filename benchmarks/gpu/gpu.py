"""All that can be learned on a CUDA device, in one command of at most eight minutes: the same
tokens as un-offloaded transformers for every family, budgets kept, plans held against the
allocator, and how fast it is.

usage: gpu.py [--minutes 8] [--part NAME ...] [--directory DIR] [--out FILE]
       gpu.py --device cpu --small --out FILE       # tries the script itself, without a card

Each part is a process of its own with a share of the time. First come those that check, side by
side, then those that measure, alone. One that fails or takes too long is recorded as such, and the
others run. The record, benchmarks/results/gpu-CARD-DATE.json, is written after every finding.
Weights are random and are written below DIR, by default the system's directory for temporary files:
47 GB at most, fewer layers where there is less room. No network is used.

Exit code 1: a token differs, a byte is over a budget, or a part failed. Without a CUDA device it
says so and ends with 0.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import site
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks import RESULTS
from benchmarks.gpu.parts.listing import Part, chosen, parts
from benchmarks.gpu.parts.record import Record
from benchmarks.gpu.parts.running import GRACE_SECONDS, Ending, run_part
from benchmarks.gpu.parts.work import Work
from benchmarks.tools.children import script

_MACHINE = Part("machine", 0)
_MACHINE_SECONDS = 120.0  # torch and transformers, read for the first time, perhaps over a network
_LEAST_SECONDS = 12.0
"""A process needs so long to begin at all; a part with less is left out."""
_MOST_AT_ONCE = 6


class Runner:
    """One run of the script: who runs when, and what is printed."""

    def __init__(self, args: argparse.Namespace, scratch: Path) -> None:
        self.stop = threading.Event()
        self._args = args
        self._scratch = scratch
        self._started = time.monotonic()

    @property
    def seconds_left(self) -> float:
        """Of the whole."""
        return self._args.minutes * 60 - (time.monotonic() - self._started)

    def machine(self) -> tuple[dict[str, Any], Ending]:
        """What it runs on; nothing if that could not be found out."""
        found: list[dict[str, Any]] = []
        ending = run_part(
            self._command(_MACHINE, _MACHINE_SECONDS),
            _MACHINE_SECONDS,
            found.append,
            self._environ(1),
            self.stop,
        )
        return (found[0] if found else {}), ending

    def run(self, there: Sequence[Part], record: Record) -> None:
        """All parts: untimed ones together, the others one by one."""
        together = [part for part in there if not part.timed]
        alone = [part for part in there if part.timed]
        at_once = max(min(_MOST_AT_ONCE, (os.cpu_count() or 1) // 2, len(together)), 1)
        if together:
            waves = -(-len(together) // at_once)
            worth = max(part.worth for part in together)
            share = worth / (worth + sum(part.worth for part in alone))
            ends = time.monotonic() + self.seconds_left * share - GRACE_SECONDS
            with ThreadPoolExecutor(at_once) as pool:
                futures = [
                    pool.submit(self._run_until, part, record, ends, at_once, waves)
                    for part in together
                ]
                try:
                    for future in futures:
                        future.result()
                except BaseException:
                    self.stop.set()  # or the pool would wait for what runs
                    raise
        for number, part in enumerate(alone):
            worth = sum(other.worth for other in alone[number:])
            seconds = (self.seconds_left - GRACE_SECONDS) * part.worth / worth
            self._run(part, record, seconds, at_once=1)
        for part in together:
            if part.name in record.left_out:  # and there is time after all
                self._run(part, record, self.seconds_left - GRACE_SECONDS, at_once=1)

    def _run_until(self, part: Part, record: Record, ends: float, at_once: int, waves: int) -> None:
        """One of several parts at a time: the last to begin need some of the time too."""
        left = ends - time.monotonic()
        self._run(part, record, left if waves == 1 else 0.75 * left, at_once)

    def _run(self, part: Part, record: Record, seconds: float, at_once: int) -> None:
        if seconds < _LEAST_SECONDS or self.stop.is_set():
            record.leave_out(part.name)
            return
        record.begin(part.name, seconds)
        started = time.monotonic()

        def take(finding: dict[str, Any]) -> None:
            record.take(part.name, finding)
            mark = "  FAULT: " + finding["fault"] if finding.get("fault") else ""
            told = f"{finding['finding']}: {finding['told']}{mark}"
            print(f"{time.monotonic() - started:6.1f} s  {part.name:24} {told}", flush=True)

        command, environ = self._command(part, seconds), self._environ(at_once)
        ending = run_part(command, seconds, take, environ, self.stop)
        record.end(part.name, ending)
        why = f", {ending.error}" if ending.error else ""
        allowed = f"of {seconds:.0f} s"
        print(f"{ending.seconds:6.1f} s  {part.name:24} {ending.state}, {allowed}{why}", flush=True)

    def _command(self, part: Part, seconds: float) -> list[str]:
        work = Work(self._args.device, self._args.small, self._scratch, time.time() + seconds)
        child = script("gpu/parts/child")
        return [*child, part.module, part.argument, work.as_json()]

    def _environ(self, at_once: int) -> dict[str, str]:
        """No network; rates that are measured here are for here alone; one thread each where many
        work side by side.
        """
        home = self._scratch / "home"
        home.mkdir(exist_ok=True)
        changed = {
            "HOME": str(home),
            "PYTHONUSERBASE": site.getuserbase(),
            "TMPDIR": str(self._scratch),
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
            "PYTHONUNBUFFERED": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        if at_once > 1 or self._args.small:
            changed["OMP_NUM_THREADS"] = "1"
        return {**os.environ, **changed}


def result_path(machine: dict[str, Any], out: Path | None) -> Path:
    """Where the record goes."""
    if out is not None:
        return out
    slug = re.sub(r"[^a-z0-9]+", "-", machine["finding"].lower()).strip("-")
    return RESULTS / f"gpu-{slug}-{machine['date']}.json"


def conclude(record: Record) -> int:
    """Say in a few lines how it went; the exit code."""
    for name, error in record.unfinished:
        print(f"not finished  {name}: {error}")
    for line in record.faults:
        print(f"FAULT         {line}")
    held = "every promise that was tried held"
    print(f"{'FAILED' if record.failed else held}; {record.path}")
    return int(record.failed)


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--device", default="cuda:0", help="cuda:0, or cpu to try the script")
    parser.add_argument("--small", action="store_true", help="tiny shapes, to try the script")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all parts (default: 8)")
    parser.add_argument("--part", action="append", default=[], metavar="NAME", help="only this")
    parser.add_argument("--directory", type=Path, help="where to put what is written")
    parser.add_argument("--out", type=Path, help="file for the record")
    args = parser.parse_args(arguments)
    if args.device == "cpu" and args.out is None:
        parser.error("a run on the CPU is no result: say with --out where its record goes")
    if args.directory is not None and not args.directory.is_dir():
        parser.error(f"--directory: there is no directory {args.directory}")
    try:
        args.parts = chosen(args.part, parts())
    except ValueError as error:
        parser.error(str(error))
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    args = parsed(arguments)
    with tempfile.TemporaryDirectory(
        prefix="ollm-gpu-", dir=args.directory, ignore_cleanup_errors=True
    ) as scratch:
        runner = Runner(args, Path(scratch))
        machine, ending = runner.machine()
        if not machine:
            if "no CUDA device" in ending.error:
                print("no CUDA device is here: nothing was run")
                return 0
            print(f"error: {ending.error}\n{ending.details}", file=sys.stderr)
            return 1
        about = {key: value for key, value in machine.items() if key not in ("finding", "told")}
        options = {"minutes": args.minutes, "small": args.small, "device": args.device}
        record = Record(result_path(machine, args.out), {**about, **options})
        print(f"{machine['finding']}: {machine['told']}\n{record.path}", flush=True)
        try:
            runner.run(args.parts, record)
        except BaseException:  # the children are not to go on when this one is ended
            runner.stop.set()
            raise
        return conclude(record)


def _ended(*_: object) -> None:
    raise SystemExit("ended by a signal; the record has what was done")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _ended)
    sys.exit(main())
