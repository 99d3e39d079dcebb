"""The peers, and for each a virtual environment that is made once and used again."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

HERE = Path(__file__).resolve().parent
TORCH = "torch==2.13.0"


class BuildError(Exception):
    """An environment could not be made; the message is one line that says why."""


@dataclass(frozen=True, slots=True)
class Peer:
    """Another program that runs a model larger than memory. `NAME.txt` says what it needs."""

    name: str
    title: str
    """For people."""
    weights: str
    """Pattern of the files that it reads, in the directory of the checkpoint."""
    distributions: Sequence[str]
    """Whose versions are recorded."""
    steps: Sequence[Sequence[str]]
    """Arguments of `pip install`, run beside the requirements, one call after the other."""


def _requirements(name: str) -> tuple[str, str]:
    return "--requirement", f"{name}.txt"


_TORCH = (TORCH,)  # first and alone, so that nothing brings another build of it

PEERS: Mapping[str, Peer] = MappingProxyType(
    {
        peer.name: peer
        for peer in (
            Peer(
                "llamacpp",
                "llama.cpp (mmap)",
                "peers/*.gguf",
                ("llama-cpp-python",),
                (("--no-cache-dir", *_requirements("llamacpp")),),  # compiled for this processor
            ),
            Peer(
                "accelerate",
                "transformers + accelerate",
                "*.safetensors",
                ("accelerate", "transformers", "torch"),
                (_TORCH, _requirements("accelerate")),
            ),
            Peer(
                "ollm-1",
                "oLLM 1.0.3",
                "*.safetensors",
                ("ollm", "transformers", "torch"),
                (_TORCH, _requirements("ollm-1"), ("--no-deps", "ollm==1.0.3")),
            ),
            Peer(
                "airllm",
                "AirLLM 4.0.0",
                "peers/airllm/**/*.safetensors",
                ("airllm", "transformers", "torch"),
                (_TORCH, _requirements("airllm")),
            ),
        )
    }
)

LLAMACPP_AVX2 = replace(
    PEERS["llamacpp"],
    name="llamacpp-avx2",
    title="llama.cpp (mmap), AVX2",
    steps=(("--no-cache-dir", *_requirements("llamacpp-avx2")),),
)
"""Compiled for processors with AVX2 and nothing beyond."""


def environment_of(peer: Peer, root: Path, say: Callable[[str], None]) -> Path:
    """The interpreter of the peer's environment in `root`, which is made if it is not there or was
    made from other requirements. What pip said is in `root/NAME.log`. Raises BuildError.
    """
    directory = root.resolve() / peer.name
    python, stamp = directory / "bin" / "python", directory / "installed.json"
    wanted = json.dumps([peer.steps, (HERE / f"{peer.name}.txt").read_text()])
    if stamp.is_file() and stamp.read_text() == wanted:
        return python
    say(f"installing {peer.title} into {directory}, once")
    root.mkdir(parents=True, exist_ok=True)
    stamp.unlink(missing_ok=True)
    log = root / f"{peer.name}.log"
    log.write_text("")
    _call([sys.executable, "-m", "venv", "--clear", str(directory)], log)
    for step in peer.steps:
        _call([str(python), "-m", "pip", "install", *step], log)
    stamp.write_text(wanted)
    return python


def versions(peer: Peer, python: Path) -> dict[str, str]:
    """Of what is installed in the peer's environment."""
    code = (
        "import importlib.metadata, json, sys\n"
        "print(json.dumps({name: importlib.metadata.version(name) for name in sys.argv[1:]}))"
    )
    command = [str(python), "-c", code, *peer.distributions]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found


def _call(command: Sequence[str], log: Path) -> None:
    """Run `command`, what it says appended to the file `log`. Raises BuildError."""
    with log.open("a") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False, cwd=HERE)
    if done.returncode:
        said = [line.strip() for line in log.read_text().splitlines() if line.strip()]
        errors = [line for line in said if line.lower().startswith("error")] or said[-1:]
        raise BuildError(f"{' '.join(errors[:1])} ({log} has the rest)")
