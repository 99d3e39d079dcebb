"""The reading engine `kvikio` (https://github.com/rapidsai/kvikio): many threads read parts of a
run at once.

The library is an extra and is imported when the engine is opened. It looks up what kind of memory a
buffer is with the NVIDIA driver, so it imports without one and then fails at every read: only a
test read shows that it works. The bytes go into host memory; reading straight into a GPU's would
need another contract than ByteSource.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ollm_core.device.buffers import PAGE, aligned_buffer, as_memoryview, round_up
from ollm_core.errors import InputError, ReadError
from ollm_core.weights.sources.page_aligned import PageAlignedSource, Run

_WHERE = re.compile(r"^KvikIO failure at: \S+:\d+: ")
"""What the library puts before a message: a line of its own source."""


class KvikioSource(PageAlignedSource):
    """Reads through KvikIO, which cuts each run into tasks for its own threads.

    How many threads there are, and whether they go past the page cache, the library knows only for
    the whole process (`KVIKIO_NTHREADS`, `KVIKIO_AUTO_DIRECT_IO_READ`), so both are left to the
    user. The size of a task it takes per call: what `KVIKIO_TASK_SIZE` says, in whole pages. Every
    task then begins on a page of file and buffer, and the library takes no bounce buffer: nothing
    but the stacks of its threads is outside the accounts.
    """

    name = "kvikio"

    def __init__(self, paths: Sequence[Path]) -> None:
        """Open `paths`, and read some of the first. Raises InputError if the library is missing or
        brings no bytes or others, and OSError for a file that cannot be opened.
        """
        super().__init__()
        self._files: dict[Path, Any] = {}  # each a kvikio.CuFile
        library = _library()
        try:
            self._task_bytes = round_up(int(library.defaults.get("task_size")))
            for path in paths:
                with path.open("rb"):  # whose errors are plainer
                    self._files[path] = library.CuFile(path)
            if paths:
                self._try_read(paths[0])
        except (RuntimeError, ValueError) as error:
            self.close()
            raise _unusable(error) from error
        except BaseException:
            self.close()
            raise

    def _try_read(self, path: Path) -> None:
        """Raises InputError unless the first bytes of `path` come."""
        with path.open("rb") as file:
            expected = file.read(PAGE)
        if not expected:
            return
        memory = aligned_buffer(PAGE)
        found = as_memoryview(memory)
        try:
            self._read_run(Run(path, 0, PAGE, len(expected)), found)
        except ReadError as error:
            raise _unusable(error.__cause__ or error) from error
        if found[: len(expected)] != expected:
            raise _unusable(f"{path}: other bytes than the file has")

    def _read_run(self, run: Run, buffer: memoryview) -> None:
        file = self._files[run.path]
        try:
            size = os.fstat(file.fileno()).st_size
            if size < run.offset + run.needed:
                raise run.ended(size)
            # Whole pages, but for the end of the file: what is less than one goes by the page
            # cache, and reading past the end is an error.
            wanted, done = min(run.num_bytes, size - run.offset), 0
            while done < wanted:
                count = file.pread(
                    buffer[done:wanted], wanted - done, run.offset + done, self._task_bytes
                ).get()
                if count <= 0:
                    raise run.ended(run.offset + done)
                done += count
        except (OSError, RuntimeError, ValueError) as error:
            raise ReadError(f"{run.path}: reading failed: {_plain(error)}") from error

    def close(self) -> None:
        while self._files:
            self._files.popitem()[1].close()


def _library() -> Any:
    """The module kvikio. Raises InputError if it cannot be imported."""
    try:
        library = importlib.import_module("kvikio")
        importlib.import_module("kvikio.defaults")
    except ModuleNotFoundError as error:
        raise InputError(
            f"the reading engine 'kvikio' needs the package kvikio: {error}",
            hint="pip install 'ollm-core[kvikio-cu12]' (or -cu13), or use reader='auto'",
        ) from error
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        raise _unusable(error) from error
    return library


def _unusable(reason: BaseException | str) -> InputError:
    return InputError(
        f"the reading engine 'kvikio' cannot read here: {_plain(reason)}",
        hint="use reader='auto'; KvikIO needs the NVIDIA driver, and KVIKIO_ settings it knows",
    )


def _plain(error: BaseException | str) -> str:
    """One line, without the place in the library's source."""
    return _WHERE.sub("", " ".join(str(error).split()))
