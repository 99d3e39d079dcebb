"""This process's reads from one disk at most so fast, by the kernel (cgroup v1 or v2; needs root).

O_DIRECT reads are slowed too. What a slower disk adds to each read's latency is not imitated.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")


@contextmanager
def throttled(directory: Path, bytes_per_second: int) -> Iterator[None]:
    """Inside the `with`, reads from the disk under `directory` are that slow; 0 means no limit."""
    if not bytes_per_second:
        yield
        return
    device = os.stat(directory).st_dev
    disk = f"{os.major(device)}:{os.minor(device)}"
    if (ROOT / "blkio").is_dir():
        home, limits = ROOT / "blkio", {"blkio.throttle.read_bps_device": f"{disk} "}
    else:
        home, limits = ROOT, {"io.max": f"{disk} rbps="}
        controllers = home / "cgroup.subtree_control"
        if "io" not in controllers.read_text().split():
            controllers.write_text("+io")
    group = home / f"ollm-benchmark-{os.getpid()}"
    group.mkdir()
    try:
        for name, start in limits.items():
            (group / name).write_text(f"{start}{bytes_per_second}")
        (group / "cgroup.procs").write_text(str(os.getpid()))
        yield
    finally:
        (home / "cgroup.procs").write_text(str(os.getpid()))
        group.rmdir()
