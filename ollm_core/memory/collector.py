"""Python's garbage collector, paused while much is made that stays."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused_collector() -> Iterator[None]:
    """In the `with`, or in a function so decorated, nothing is collected; after it the collector is
    as before. It belongs to the process: other threads meanwhile do without it, too.

    What describes a checkpoint of 70,000 tensors are half a million objects, none of them garbage.
    The collector goes through all that torch and transformers hold several times while they are
    made: half of the time in which a model is opened.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
