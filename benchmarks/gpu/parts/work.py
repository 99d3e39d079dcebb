"""What a part is given, and how it says what it has found. Free of torch."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Protocol, Self


@dataclass(frozen=True, slots=True)
class Work:
    """Where and how long a part works."""

    device: str
    """"cuda:0", or "cpu" to try the script itself."""
    small: bool
    """Tiny shapes, to try the script itself."""
    directory: Path
    """For its files. Shared by all parts: a checkpoint that one has written others find there."""
    ends: float
    """When it should have ended, as `time.time()` counts; soon after it is killed."""

    @property
    def seconds_left(self) -> float:
        """Until then."""
        return self.ends - time.time()

    @property
    def on_card(self) -> bool:
        """Whether the device is a GPU."""
        return self.device != "cpu"

    def path(self, name: str) -> Path:
        """A directory of this name for the part's own files, made if need be."""
        path = self.directory / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def as_json(self) -> str:
        """For the child's command line."""
        return json.dumps({**asdict(self), "directory": str(self.directory)})

    @classmethod
    def from_json(cls, text: str) -> Self:
        """What `as_json` wrote."""
        fields = json.loads(text)
        return cls(**{**fields, "directory": Path(fields["directory"])})


class Tell(Protocol):
    """Takes a finding as soon as there is one."""

    def __call__(self, name: str, told: str, *, fault: str = "", **fields: Any) -> None:
        """`name` says what was looked at, `told` in one line what was seen, `fields` the numbers,
        for JSON. `fault` is a promise that was broken: another token, a byte over the budget.
        """


class OutOfTime(Exception):
    """A part ends before all is done, because its time is up; the message says what is missing."""


def teller(out: IO[str]) -> Tell:
    """Writes each finding to `out` as a line of JSON, which the parent reads."""

    def tell(name: str, told: str, *, fault: str = "", **fields: Any) -> None:
        line = {"finding": name, "told": told, **({"fault": fault} if fault else {}), **fields}
        print(json.dumps(line), file=out, flush=True)

    return tell
