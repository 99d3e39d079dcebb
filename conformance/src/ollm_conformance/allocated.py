"""What is really allocated on a CPU, whatever the accounts say: tensors that are alive, and those
that come and go. What the process has beside them is in `process_memory`.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def only_new_objects() -> Iterator[None]:
    """Inside the `with` block `gc.collect` and `live_bytes` look only at what was made there: there
    are some 400,000 objects before it.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def live_bytes() -> int:
    """Bytes of all CPU tensors that Python knows of, each storage once."""
    sizes = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())
