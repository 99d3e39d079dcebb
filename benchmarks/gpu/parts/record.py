"""The record of a run, written after every finding: what kills the run leaves what was done."""

from __future__ import annotations

import json
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.gpu.parts.running import Ending

_LEFT_OUT = "no time left"


class Record:
    """Findings by part. Its methods may be called from any thread."""

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        """`about` says when, where and how."""
        self.path = path
        self.faults: list[str] = []
        """Promises that were broken, by part and finding."""
        self._parts: dict[str, dict[str, Any]] = {}
        self._about = about
        self._lock = threading.Lock()

    @property
    def unfinished(self) -> list[tuple[str, str]]:
        """Parts that failed, that were cut short, or that did not begin, and why."""
        return [
            (name, f"{one['state']}, {one['error']}" if "error" in one else one["state"])
            for name, one in self._parts.items()
            if one["state"] != "done"
        ]

    @property
    def left_out(self) -> list[str]:
        """Parts for which there was no time so far."""
        return [name for name, one in self._parts.items() if one["state"] == _LEFT_OUT]

    @property
    def failed(self) -> bool:
        """Whether a promise was broken or a part failed."""
        return bool(self.faults) or any(one["state"] == "failed" for one in self._parts.values())

    def begin(self, part: str, seconds: float) -> None:
        """A part begins, which is given so many seconds."""
        with self._lock:
            found: dict[str, Any] = {"state": "running", "allowed_seconds": round(seconds, 1)}
            self._parts[part] = {**found, "findings": {}}
            self._write()

    def take(self, part: str, finding: dict[str, Any]) -> None:
        """What a part has said."""
        with self._lock:
            fields = {key: value for key, value in finding.items() if key != "finding"}
            self._parts[part]["findings"][finding["finding"]] = fields
            if fault := finding.get("fault"):
                self.faults.append(f"{part}, {finding['finding']}: {fault}")
            self._write()

    def end(self, part: str, ending: Ending) -> None:
        """A part has ended."""
        with self._lock:
            told = {key: value for key, value in asdict(ending).items() if value != ""}
            found = self._parts[part]
            self._parts[part] = {**found, **told, "seconds": round(ending.seconds, 1)}
            self._write()

    def leave_out(self, part: str) -> None:
        """A part for which there is no time."""
        with self._lock:
            self._parts[part] = {"state": _LEFT_OUT, "findings": {}}
            self._write()

    def _write(self) -> None:
        whole = {
            **self._about,
            "faults": self.faults,
            "unfinished": [f"{name}: {error}" for name, error in self.unfinished],
            "parts": self._parts,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f".{self.path.name}")
        partial.write_text(json.dumps(whole, indent=1, default=str) + "\n")
        partial.replace(self.path)
