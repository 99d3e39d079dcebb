"""What is run in turns, and what a peer needs before: an environment, its copy of the weights."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers.copies import write_gguf
from benchmarks.peers.environments import BuildError, Peer, environment_of
from benchmarks.tools.children import script


@dataclass(frozen=True, slots=True)
class Program:
    """What is run in turns with others. It prints the line that `cold.told` describes."""

    name: str
    title: str
    command: Sequence[str]
    files: Sequence[Path]
    """That it reads its weights from."""


def environ() -> dict[str, str]:
    """That of a peer: no network."""
    return {**os.environ, "HF_HUB_OFFLINE": "1"}


def program_of(
    peer: Peer,
    checkpoint: Path,
    prompt: Path,
    num_new_tokens: int,
    environments: Path,
    say: Callable[[str], None],
) -> Program:
    """`peer` with its environment made in `environments` and its copy of the weights written to
    `checkpoint/peers`, if they are not there. Raises BuildError.
    """
    python = environment_of(peer, environments, say)
    command = [*script("run_peer", str(python)), peer.name, str(checkpoint)]
    if not any(checkpoint.glob(peer.weights)):
        say(f"writing the weights for {peer.title}")
        if peer.weights.endswith(".gguf"):
            write_gguf(checkpoint, checkpoint / "peers" / "model-bf16.gguf")
        else:
            _write(command)
    files = sorted(checkpoint.glob(peer.weights))
    command += [str(prompt), "--new", str(num_new_tokens)]
    return Program(peer.name, peer.title, command, files)


def _write(command: Sequence[str]) -> None:
    """Let the peer open the model once. Raises BuildError with the last line that it said."""
    with tempfile.TemporaryFile("w+") as errors:
        done = subprocess.run([*command, "--prepare"], env=environ(), stderr=errors, check=False)
        if done.returncode:
            errors.seek(0)
            lines = [line.strip() for line in errors if line.strip()]
            raise BuildError(f"exit code {done.returncode}, {' '.join(lines[-1:])}")
