"""A server under bounded load for a long time: its memory stays flat, and its answers right.

usage: soak.py [CHECKPOINT] [--minutes 30] [--clients 4] [--json FILE] [--plot FILE.png]

Without CHECKPOINT, models/smollm2-135M. So many clients ask, one request after another, for chats
and completions of chance length: whole, streamed, left in the middle, read slowly, damaged, with a
schema. One of them asks the same greedy question again and again: its answer must stay the same.
All is on loopback. The memory of the process is read every five seconds; flat means that its mean
over the last fifth is at most 2% above that over the second.

Exit code 1: another answer, an error of the server's, or memory that grows. The last line on stdout
is the record as JSON; the report for people goes to stderr.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks import MODELS
from benchmarks.serving.server import Server, serving, stream
from benchmarks.tools.measure import environment, finish

SAMPLE_SECONDS = 5.0
GROWTH = 1.02
WORDS = ["river", "stone", "light", "paper", "winter", "garden", "engine", "letter", "market"]
QUESTION = {"messages": [{"role": "user", "content": "Name a colour."}], "max_tokens": 12}


class Clients:
    """They ask until the time is over."""

    def __init__(self, server: Server, until: float) -> None:
        self._server, self._until = server, until
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._expected = ""

    def start(self, number: int) -> list[threading.Thread]:
        """So many."""
        self._expected = self._fixed()
        threads = [threading.Thread(target=self._asks, args=(i,)) for i in range(number)]
        for thread in threads:
            thread.start()
        return threads

    def _asks(self, seed: int) -> None:
        chance = random.Random(seed)
        while time.monotonic() < self._until and not self.wrong:
            try:
                kind = "fixed" if seed == 0 else chance.choice(list(self._KINDS))
                self._KINDS[kind](self, chance)
                self.counts[kind] += 1
            except Exception as error:  # noqa: BLE001 # told, whatever it was
                self.wrong.append(f"{type(error).__name__}: {error}")
            time.sleep(chance.random() * 0.2)

    def _fixed(self, _: object = None) -> str:
        found = stream(self._server, "/v1/chat/completions", {**QUESTION, "temperature": 0})
        if self._expected and found.text != self._expected:
            self.wrong.append(f"another answer: {found.text!r}, before {self._expected!r}")
        return found.text

    def _body(self, chance: random.Random) -> dict[str, Any]:
        text = " ".join(chance.choices(WORDS, k=chance.randint(1, 200)))
        most = chance.randint(1, 24)
        return {"messages": [{"role": "user", "content": text}], "max_tokens": most}

    def _post(self, data: bytes, expected: int, path: str = "/v1/chat/completions") -> None:
        connection = http.client.HTTPConnection(self._server.host, self._server.port, timeout=600)
        connection.request("POST", path, data, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        answer.read()
        connection.close()
        if answer.status != expected:
            self.wrong.append(f"status {answer.status}, expected {expected}")

    def _whole(self, chance: random.Random) -> None:
        self._post(json.dumps(self._body(chance)).encode(), 200)

    def _streamed(self, chance: random.Random) -> None:
        stream(self._server, "/v1/chat/completions", self._body(chance))

    def _completion(self, chance: random.Random) -> None:
        body = {"prompt": " ".join(chance.choices(WORDS, k=9)), "max_tokens": 8, "echo": True}
        self._post(json.dumps(body).encode(), 200, "/v1/completions")

    def _schema(self, chance: random.Random) -> None:
        wanted = {"type": "json_schema", "json_schema": {"schema": {"enum": ["yes", "no"]}}}
        self._post(json.dumps({**self._body(chance), "response_format": wanted}).encode(), 200)

    def _damaged(self, chance: random.Random) -> None:
        self._post(b"[" * chance.randint(1, 100_000), 400)

    def _left(self, chance: random.Random) -> None:
        """Goes away in the middle."""
        connection = http.client.HTTPConnection(self._server.host, self._server.port, timeout=600)
        body = json.dumps({**self._body(chance), "stream": True, "max_tokens": 200})
        connection.request("POST", "/v1/chat/completions", body)
        answer = connection.getresponse()
        for _ in range(chance.randint(0, 5)):
            answer.readline()
        connection.close()

    def _slow(self, chance: random.Random) -> None:
        """Reads a byte now and then."""
        connection = http.client.HTTPConnection(self._server.host, self._server.port, timeout=600)
        body = json.dumps({**self._body(chance), "stream": True})
        connection.request("POST", "/v1/chat/completions", body)
        answer = connection.getresponse()
        for _ in range(chance.randint(1, 20)):
            if not answer.read(1):
                break
            time.sleep(0.1)
        connection.close()

    _KINDS = {  # noqa: RUF012 # never changed
        "fixed": _fixed, "whole": _whole, "streamed": _streamed, "completion": _completion,
        "schema": _schema, "damaged": _damaged, "left": _left, "slow": _slow,
    }  # fmt: skip


def resident_bytes(pid: int) -> int:
    """Memory of a process that is no file's."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


def watched(server: Server, until: float) -> list[tuple[float, int]]:
    """Seconds since the beginning, and bytes, until the time is over."""
    began, found = time.monotonic(), []
    while time.monotonic() < until:
        found.append((round(time.monotonic() - began, 1), resident_bytes(server.pid)))
        time.sleep(SAMPLE_SECONDS)
    return found


def mean(samples: list[tuple[float, int]], fifth: int) -> float:
    """Bytes over one of five parts of the time."""
    part = samples[len(samples) * fifth // 5 : len(samples) * (fifth + 1) // 5] or samples
    return sum(one for _, one in part) / len(part)


def draw(samples: list[tuple[float, int]], path: Path) -> None:
    """Memory over time."""
    figure = Figure(figsize=(8, 3), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([at / 60 for at, _ in samples], [one / 1e6 for _, one in samples])
    axes.set(xlabel="minutes", ylabel="MB of the process", ylim=(0, None), title="ollm serve")
    figure.savefig(path, dpi=120)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("checkpoint", type=Path, nargs="?", default=MODELS / "smollm2-135M")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--json", type=Path, help="write the record to this file")
    parser.add_argument("--plot", type=Path, help="draw memory over time")
    return parser.parse_args()


def main() -> None:
    args = parse()
    options = ["--device", "cpu", "--device-memory", "600MB", "--context", "1024"]
    with serving(args.checkpoint, options) as server:
        until = time.monotonic() + args.minutes * 60
        clients = Clients(server, until)
        threads = clients.start(args.clients)
        samples = watched(server, until)
        for thread in threads:
            thread.join()
    before, after = mean(samples, 1), mean(samples, 4)
    record = {
        **environment(args.checkpoint),
        "minutes": args.minutes,
        "clients": args.clients,
        "requests": dict(clients.counts),
        "wrong": clients.wrong,
        "second_fifth_bytes": round(before),
        "last_fifth_bytes": round(after),
        "samples": samples,
        "load_average": round(os.getloadavg()[0], 2),
    }
    print(
        f"{sum(clients.counts.values())} requests in {args.minutes:g} minutes; memory "
        f"{before / 1e6:.1f} MB, then {after / 1e6:.1f} MB; "
        f"{'; '.join(clients.wrong) or 'no wrong answer'}",
        file=sys.stderr,
    )
    if args.plot:
        draw(samples, args.plot)
    finish(record, args.json)
    if clients.wrong or after > GROWTH * before:
        sys.exit(1)


if __name__ == "__main__":
    main()
