"""What is free on the host, read from trees as the kernel shows them."""

from __future__ import annotations

import pytest

from ollm_core.memory.host import HostMemory

GIB = 1 << 30


@pytest.fixture
def tree(tmp_path):
    """What reads a machine of 16 GiB, 10 of them available, on which the kernel tells `group`."""

    def make(group=""):
        proc = tmp_path / "proc"
        (proc / "self").mkdir(parents=True)
        meminfo = f"MemTotal: {16 << 20} kB\nMemFree: 1 kB\nMemAvailable: {10 << 20} kB\n"
        (proc / "meminfo").write_text(meminfo)
        (proc / "self/cgroup").write_text(group)
        return HostMemory(proc, tmp_path / "cgroup")

    return make


def written(directory, limit, used, cache, *, version):
    """Write a group's three files."""
    names = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        2: ("memory.max", "memory.current", "inactive_file"),
    }[version]
    directory.mkdir(parents=True, exist_ok=True)
    (directory / names[0]).write_text(f"{limit}\n")
    (directory / names[1]).write_text(f"{used}\n")
    (directory / "memory.stat").write_text(f"anon 17\n{names[2]} {cache}\nactive_file 3\n")


def test_the_machine_alone(tree):
    """What is available, not only what is unused."""
    memory = tree()
    assert (memory.free(), memory.total()) == (10 * GIB, 16 * GIB)


@pytest.mark.parametrize(
    ("version", "told", "place"),
    [
        (2, "0::/app/run\n", "app/run"),
        (2, "0::/\n", ""),
        (2, "0::/docker/of-the-host\n", ""),
        (1, "7:cpu:/app\n4:memory:/app/run\n0::/\n", "memory/app/run"),
        (1, "4:cpu,memory:/docker/of-the-host\n", "memory"),
    ],
)
def test_a_group_counts(tree, tmp_path, version, told, place):
    """Its limit less what it uses; file pages that it could drop are free. In a container the path
    may be one of the host.
    """
    written(tmp_path / "cgroup" / place, 4 * GIB, 3 * GIB, GIB // 2, version=version)
    memory = tree(told)
    assert (memory.free(), memory.total()) == (GIB + GIB // 2, 4 * GIB)


def test_a_group_above_counts(tree, tmp_path):
    """A pod's limit holds for a container that has none of its own."""
    written(tmp_path / "cgroup/pod/one", "max", 2 * GIB, 0, version=2)
    written(tmp_path / "cgroup/pod", 3 * GIB, 2 * GIB, 0, version=2)
    memory = tree("0::/pod/one\n")
    assert (memory.free(), memory.total()) == (GIB, 3 * GIB)


def test_no_limit_and_more_than_the_limit(tree, tmp_path):
    """Version 1 writes a huge number for none. A group that uses more than its limit has nothing
    free.
    """
    written(tmp_path / "cgroup/memory", (1 << 63) - 4096, GIB, 0, version=1)
    memory = tree("4:memory:/\n")
    assert (memory.free(), memory.total()) == (10 * GIB, 16 * GIB)
    written(tmp_path / "cgroup/memory", GIB, 2 * GIB, 0, version=1)
    assert memory.free() == 0


def test_a_system_that_tells_nothing(tmp_path):
    """Something is assumed; nothing fails."""
    memory = HostMemory(tmp_path, tmp_path)
    assert 0 < memory.free() <= memory.total()
