"""A model that nobody closes, closes itself: no file, thread or KV stays behind it."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import ollm
from ollm_core import InputError
from ollm_core.contracts.closing import Belongings, close_outside


@pytest.fixture
def nothing_stays() -> Iterator[None]:
    """The same open files and threads as before, with no help of the garbage collector."""
    gc.collect()
    before = open_files(), set(threading.enumerate())
    gc.disable()
    try:
        yield
        assert (open_files(), set(threading.enumerate())) == before
    finally:
        gc.enable()


def open_files() -> list[str]:
    here = Path("/proc/self/fd")
    # The one that lists them is gone.
    return sorted(os.readlink(path) for path in list(here.iterdir()) if os.path.lexists(path))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"device_memory": "600kB", "reader": "mmap"},  # streams
        {"kv": "disk"},
        {"draft": "model"},
    ],
    ids=lambda options: ",".join(map(str, options.values())),
)
def test_a_model_that_is_dropped(tiny: Path, ids, tmp_path: Path, nothing_stays, options):
    """Between two passes, after an answer, with a cache that is still held."""
    if "draft" in options:
        options = {**options, "draft_model": tiny}
    model = ollm.load(tiny, device="cpu", kv_dir=tmp_path / "kv", keep_kv=False, **options)
    model.generate(ids(40)[None], max_new_tokens=3, do_sample=False)
    cache = model.new_cache()
    model(ids(10)[None], past_key_values=cache)
    del model
    assert not list((tmp_path / "kv").iterdir())
    with pytest.raises(InputError, match="closed"):
        cache.store.new_sequence()


def test_a_model_in_an_error(tiny: Path, ids, nothing_stays):
    """What an exception held goes with it."""

    def fail(progress: object) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as raised:
        ollm.load(tiny, device="cpu", on_progress=fail)(ids(10)[None])
    del raised
    # Frames of torch, and of pytest.raises, are circles.
    gc.collect()


def test_an_interrupted_load(tiny: Path, monkeypatch, nothing_stays):
    """Nothing is open, however far it had come."""

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for where in ("inspect_model", "Engine", "StoreOpener", "StreamedModel.draft_with"):
        with monkeypatch.context() as patched:
            patched.setattr(f"ollm_core.loader.{where}", interrupt)
            with pytest.raises(KeyboardInterrupt):
                ollm.load(tiny, device="cpu")
    gc.collect()


def test_kept_kv_is_kept_by_a_model_that_is_dropped(tiny: Path, ids, tmp_path: Path):
    """As if it had been closed."""
    for cached in (0, 39):
        model = ollm.load(tiny, device="cpu", kv_dir=tmp_path)
        model.generate(ids(40)[None], max_new_tokens=1, do_sample=False)
        assert model.stats.cached_tokens == cached
        del model


def test_a_script_that_ends(tiny: Path, tmp_path: Path):
    """Without closing, and by an exception: the interpreter ends, and nothing is left."""
    code = (
        "import sys, torch, ollm\n"
        "where = {'kv': 'disk', 'kv_dir': sys.argv[2], 'keep_kv': False}\n"
        "model = ollm.load(sys.argv[1], device='cpu', **where)\n"
        "cache = model.new_cache()\n"
        "model(torch.ones(1, 9, dtype=torch.long), past_key_values=cache)\n"
        "1 / 0\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, str(tiny), str(tmp_path / "kv")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("ZeroDivisionError"), done.stderr
    assert not list((tmp_path / "kv").iterdir())


def test_closing_in_a_thread_of_ours(tiny: Path):
    """The collector may run there: closing waits for that thread, and so must not run in it."""
    closed: list[str] = []

    def close() -> None:
        closed.append(threading.current_thread().name)
        reader.join()

    reader = threading.Thread(target=lambda: close_outside(close), name="ollm-reader")
    reader.start()
    reader.join(30)
    assert not reader.is_alive()
    for thread in threading.enumerate():
        if thread.name == (closed or [""])[0]:
            thread.join(30)
    assert closed != ["ollm-reader"]


def test_a_part_that_cannot_be_closed():
    """Does not keep the others open."""
    closed = []

    def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Belongings(fail, lambda: closed.append(1)).close()
    assert closed == [1]
