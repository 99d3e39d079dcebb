"""A server for the other scripts here: `ollm serve` in a process of its own, on a free port."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def served(model: str, *options: str) -> Iterator[str]:
    """Its address, for example http://127.0.0.1:40123, for the length of a `with` block."""
    command = [sys.executable, "-c", "import ollm; ollm.main()", "serve", model]
    command += ["--port", "0", "--device", "cpu", *options]
    environment = {name: value for name, value in os.environ.items() if name != "OLLM_API_KEY"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as server:
        assert server.stderr
        try:
            told = []
            for line in server.stderr:
                told.append(line)
                if found := re.search(r"at (http://\S+)/v1", line):
                    threading.Thread(target=server.stderr.read, daemon=True).start()
                    yield found[1]
                    return
            raise RuntimeError("".join(told))
        finally:
            server.terminate()
