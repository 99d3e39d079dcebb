"""A store's directory: what a killed process leaves, what is reaped, and what must stay."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from array import array
from pathlib import Path

import pytest
from kept_prefixes import GEOMETRY, kept, numbers, open_store
from kept_states import found, keep_a_run

import ollm
from ollm_core import InputError, KVStoreError
from ollm_core.cli.main import main
from ollm_core.device.buffers import PAGE
from ollm_core.kv.disk.directory import make_home, reap_homes
from ollm_core.kv.disk.journal import Prefix
from ollm_core.kv.disk.layer_file import MAGIC
from ollm_core.kv.factory import find_directory

NESTED = (MAGIC + b'{"version": ' + b"[" * 4000).ljust(PAGE, b"\0")

KILLED = """
import os, signal, sys
from pathlib import Path
from kept_prefixes import GEOMETRY
from kept_states import GEOMETRY as HYBRID
from ollm_core.kv.recurrent.snapshots import StateFiles
from ollm_core.kv.disk.directory import make_home
from ollm_core.kv.recurrent.snapshots import StateWriter
parent = Path(sys.argv[1])
make_home(parent, GEOMETRY, "f00d", keeping=False)
make_home(parent, GEOMETRY, "f00d", keeping=True)
(parent / "ollm-kv-abcdefgh").mkdir(0o700)
StateWriter(StateFiles(parent, HYBRID, "f00d"), 3).write(0, [])
os.kill(os.getpid(), signal.SIGKILL)
"""


def homes(parent: Path) -> list[Path]:
    return list(parent.glob("ollm-kv-*"))


def test_what_a_killed_run_left_goes_with_the_next(tmp_path: Path):
    """But for what it has kept, what another one has, and what is not ours."""
    directory, tests = tmp_path / "kv", str(Path(__file__).parents[2])
    kept(directory, numbers(20))
    (stays,) = homes(directory)
    environment = {**os.environ, "PYTHONPATH": tests}
    subprocess.run([sys.executable, "-c", KILLED, str(directory)], env=environment, check=False)
    assert len(homes(directory)) == 4
    (new,) = directory.glob("ollm-states-*/new-*")
    foreign = directory / "ollm-kv-foreign1"
    foreign.mkdir(0o700)
    (foreign / "letter.txt").write_text("mine")
    with make_home(directory, GEOMETRY, "f00d", keeping=False) as home:
        find_directory(directory)
        assert set(homes(directory)) == {stays, home.directory, foreign}
        assert not new.exists()
    with open_store(directory) as store:
        assert store.find(numbers(20))[1] == 20


def test_a_home_of_another_version_stays(tmp_path: Path):
    """What it has kept cannot be read here."""
    kept(tmp_path, numbers(20))
    (home,) = homes(tmp_path)
    journal = home / "prefixes.journal"
    journal.write_bytes(journal.read_bytes().replace(b'"version": 1', b'"version": 2'))
    reap_homes(tmp_path)
    assert homes(tmp_path) == [home]
    assert len(list(home.iterdir())) == 3


def test_models_clear_up_after_others(tiny: Path, tmp_path: Path, monkeypatch):
    """In the default directory too, whatever KV they use themselves."""
    monkeypatch.setenv("HOME", str(tmp_path))
    default = tmp_path / ".cache/ollm/kv"
    home = make_home(default, GEOMETRY, "f00d", keeping=False)
    home.prefixes.append(Prefix(array("i"), ()))  # closed as by a kill: nothing is removed
    home.close()
    assert homes(default)
    with ollm.load(tiny, device="cpu", kv="device"):
        assert not homes(default)


@pytest.mark.parametrize("name", ["prefixes.journal", "layer-00000.kv"])
def test_a_header_of_nested_brackets_is_not_found(tmp_path: Path, capsys, name: str):
    """Nothing is raised, by a store or by `ollm cache`."""
    kept(tmp_path, numbers(20))
    (home,) = homes(tmp_path)
    with (home / name).open("r+b") as file:
        file.write(NESTED)
    with open_store(tmp_path) as store:
        assert store.find(numbers(20))[1] == 0
    for command in (["list"], ["verify"], ["remove", "--all"], ["list"]):
        with pytest.raises(SystemExit) as end:
            main(["cache", *command, "--kv-dir", str(tmp_path), "--json"])
        out, err = capsys.readouterr()
        assert (end.value.code, err) == (0, "")
        json.loads(out)
    assert not home.exists()


def test_a_state_of_nested_brackets_is_not_found(tmp_path: Path):
    """As any other that is damaged."""
    keep_a_run(tmp_path, [5, 6, 7, 8, 9], (3,))
    for path in tmp_path.glob("ollm-states-*/*.state"):
        with path.open("r+b") as file:
            file.write(NESTED)
    assert found(tmp_path, [5, 6, 7, 8, 9, 1]) == 0


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("file", "not a directory"),
        ("file/kv", "not a directory"),
        ("dangling", "not a directory"),
        ("n" * 300, "name too long"),
        ("/proc/kv", "No such file"),
        ("/proc", ""),
        ("a\0b", "is not a path"),
        ("", "is not a path"),
    ],
)
def test_where_no_kv_can_be(tmp_path: Path, name: str, reason: str):
    """One line before anything is opened, even where no KV on disk is asked for."""
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere" / "else")
    where = name if "/p" in name or not name else f"{tmp_path}/{name}"
    with pytest.raises(InputError) as refused:
        ollm.load("no-such-model", kv="device", kv_dir=where)
    assert reason in str(refused.value)
    assert "\n" not in str(refused.value)
    assert isinstance(refused.value, KVStoreError) or "path" in reason
