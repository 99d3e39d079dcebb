"""The reading engine of KvikIO: our side of it against a stand-in, and the library itself where it
is installed, over a driver that knows no device.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

import ollm
from ollm_conformance import ByteSourceConformance
from ollm_core import InputError, ReadError, TensorInfo
from ollm_core.calibration import rates
from ollm_core.calibration.disk import measure_readers
from ollm_core.device.buffers import PAGE, aligned_buffer, as_memoryview
from ollm_core.weights.sources.kvikio import KvikioSource
from ollm_core.weights.sources.posix import open_source

_REAL = "OLLM_TEST_KVIKIO"  # set where TestKvikioSource is to run with the library itself
_CALLS = """
    Init MemHostAlloc MemFreeHost MemHostRegister MemHostUnregister MemcpyHtoDAsync MemcpyDtoHAsync
    MemcpyAsync PointerGetAttribute PointerGetAttributes CtxCreate CtxDestroy CtxPushCurrent
    CtxPopCurrent CtxGetCurrent CtxGetDevice MemGetAddressRange GetErrorName GetErrorString
    DeviceGet DeviceGetCount DeviceGetAttribute DevicePrimaryCtxRetain DevicePrimaryCtxRelease
    StreamSynchronize StreamCreate StreamDestroy EventSynchronize EventCreate EventDestroy
    EventRecord EventQuery LaunchHostFunc
"""
"""Those of the driver that the library looks up."""


class StandInFile:
    """A `kvikio.CuFile` as its documentation has it, but that it brings few bytes at a time."""

    most = 10_000

    def __init__(self, path):
        self._file = os.open(path, os.O_RDONLY)

    def fileno(self):
        """Of the file that is open."""
        return self._file

    def pread(self, buf, size, file_offset, task_size):
        """Read, and give a future. Tasks and buffers lie on pages, as the engine promises."""
        assert task_size % PAGE == 0
        assert len(buf) == size
        try:
            count = os.preadv(self._file, [buf[: self.most]], file_offset)
        except OSError as error:
            raise RuntimeError(f"KvikIO failure at: /x/posix_io.hpp:17: {error}") from error
        if not count:
            raise RuntimeError("KvikIO failure at: /x/posix_io.hpp:173: POSIX error on pread: EOF")
        return SimpleNamespace(get=lambda: count)

    def close(self):
        """Close the file."""
        os.close(self._file)


def stand_in(task_size=5000, file=StandInFile):
    """Modules to put in the place of the library's."""
    library = ModuleType("kvikio")
    library.CuFile = file
    library.defaults = ModuleType("kvikio.defaults")
    library.defaults.get = {"task_size": task_size}.__getitem__
    return {"kvikio": library, "kvikio.defaults": library.defaults}


@pytest.fixture(autouse=True)
def library(monkeypatch, tmp_path_factory):
    """The stand-in, unless the library itself is asked for; no rates that this machine has kept."""
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
    if _REAL not in os.environ:
        for name, module in stand_in().items():
            monkeypatch.setitem(sys.modules, name, module)


class TestKvikioSource(ByteSourceConformance):
    """Every promise of a reading engine."""

    @classmethod
    def open_source(cls, paths):
        return KvikioSource(paths)


@pytest.mark.skipif(importlib.util.find_spec("kvikio") is None, reason="KvikIO is not installed")
@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc to make a driver with")
@pytest.mark.parametrize("direct", [False, True])
def test_the_library_itself(tmp_path, direct):
    """The same checks with the real library, buffered and direct, in a process of its own.

    Its driver is made here and says of every pointer that no device was initialised, which KvikIO
    takes for host memory: as with a real driver before anything of CUDA runs.
    """
    calls = [f"int cu{name}{v}(void) {{ return 3; }}" for name in _CALLS.split()
             for v in ("", "_v2", "_v3", "_v4")]  # fmt: skip
    calls.append("int cuDriverGetVersion(int *version) { *version = 12000; return 0; }")
    (tmp_path / "driver.c").write_text("\n".join(calls))
    command = ["gcc", "-shared", "-fPIC", "-o", tmp_path / "libcuda.so.1", tmp_path / "driver.c"]
    subprocess.run(command, check=True)
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__,
         "-k", "TestKvikioSource"],
        env={
            **os.environ,
            _REAL: "1",
            "LD_LIBRARY_PATH": str(tmp_path),
            "KVIKIO_NTHREADS": "4",
            "KVIKIO_TASK_SIZE": "5000",  # rounded up: it would need bounce buffers
            "KVIKIO_AUTO_DIRECT_IO_READ": str(int(direct)),
        },
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stdout + found.stderr
    assert "KvikioSource: 11 passed" in found.stdout


@pytest.fixture
def model_file(tmp_path):
    """A file of three pages and a bit."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(os.urandom(3 * PAGE + 100))
    return path


def test_without_the_library(monkeypatch, model_file):
    """One line that says what to install; "auto" goes without, and the doctor leaves it out."""
    monkeypatch.setitem(sys.modules, "kvikio", None)
    with pytest.raises(InputError, match="needs the package kvikio") as refused:
        open_source([model_file], "kvikio")
    assert "ollm-core[kvikio-cu12]" in refused.value.hint
    with open_source([model_file]) as source:
        assert source.name in ("direct", "mmap")
    monkeypatch.setattr("ollm_core.calibration.disk._LEAST_FILE_BYTES", PAGE)
    assert "kvikio" not in measure_readers(model_file.parent)


def test_where_it_cannot_read(monkeypatch, model_file):
    """No driver, settings it does not know, other bytes: each refused when it is opened."""

    class NoDriver(StandInFile):
        def pread(self, *_):
            raise RuntimeError("KvikIO failure at: /x/shim/utils.cpp:21: libcuda.so.1: not found")

    class OtherBytes(StandInFile):
        def pread(self, buf, size, *_):
            buf[:size] = bytes(size)
            return SimpleNamespace(get=lambda: size)

    def refused(**given):
        for name, module in stand_in(**given).items():
            monkeypatch.setitem(sys.modules, name, module)
        with pytest.raises(InputError) as error:
            open_source([model_file], "kvikio")
        return str(error.value)

    assert ": libcuda.so.1: not found" in refused(file=NoDriver)
    assert "/x/" not in refused(file=NoDriver)
    assert "other bytes" in refused(file=OtherBytes)
    assert "cannot read here" in refused(task_size="many")


def test_a_missing_file_is_no_fault_of_the_library(tmp_path):
    """It is named as for the other engines."""
    with pytest.raises(ReadError, match=r"none\.safetensors: No such file"):
        open_source([tmp_path / "none.safetensors"], "kvikio")


def test_an_end_that_comes_while_reading(model_file, monkeypatch):
    """What the library raises is a ReadError with the file's name."""
    tensor = TensorInfo("t", "U8", (3 * PAGE,), model_file, 0, 3 * PAGE)
    with KvikioSource([model_file]) as source:
        monkeypatch.setattr(os, "fstat", lambda _: SimpleNamespace(st_size=3 * PAGE + 100))
        os.truncate(model_file, PAGE)
        buffer = aligned_buffer(source.buffer_bytes([tensor]))
        with pytest.raises(ReadError, match=r"model\.safetensors: reading failed: POSIX error"):
            source.read([tensor], as_memoryview(buffer))


def test_auto_takes_it_where_it_was_the_fastest(monkeypatch, tiny, ids):
    """The doctor measures it; it reads the same logits; and what is gone since is done without."""
    with ollm.load(tiny, device="cpu") as model:
        default, expected = model.stats.reader, model(input_ids=ids(40)[None]).logits

    def kept(**readers):
        rates.rates_file().parent.mkdir(parents=True, exist_ok=True)
        rates.rates_file().write_text(json.dumps({rates._disk_key(tiny): {"readers": readers}}))
        with ollm.load(tiny, device="cpu") as model:
            assert torch.equal(model(input_ids=ids(40)[None]).logits, expected)
            return model.stats.reader

    assert kept(direct=1e9, mmap=1.2e9, kvikio=1.3e9) == "kvikio"
    assert kept(direct=1e9, mmap=1.3e9, kvikio=1.2e9) == "mmap"
    assert kept(direct=1e9, mmap=1e9, kvikio=1.05e9) == default
    assert kept(mmap=1e9, kvikio=2e9) == "kvikio"
    assert kept(direct=1e9, another=9e9) == default
    monkeypatch.setitem(sys.modules, "kvikio", None)
    assert kept(direct=1e9, kvikio=2e9) == default


def test_no_engine_works(monkeypatch, model_file):
    """The doctor says why, in one line, rather than measure nothing."""
    monkeypatch.setattr("ollm_core.calibration.disk._LEAST_FILE_BYTES", PAGE)
    monkeypatch.setattr(
        "ollm_core.calibration.disk.open_source",
        lambda paths, name: open_source([paths[0] / "x"], name),
    )
    with pytest.raises(ReadError, match="Not a directory"):
        measure_readers(model_file.parent)


def test_the_doctor_measures_it(monkeypatch, model_file):
    """Beside the others."""
    monkeypatch.setattr("ollm_core.calibration.disk._LEAST_FILE_BYTES", PAGE)
    found = measure_readers(Path(model_file.parent))
    assert found["kvikio"] > 0
    assert found["mmap"] > 0
