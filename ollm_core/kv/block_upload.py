"""Copies blocks to a device with memory of its own, as they are read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from ollm_core.contracts.closing import Closing
from ollm_core.contracts.kv import KVGeometry
from ollm_core.device.transfer import Bus
from ollm_core.device.upload import Upload
from ollm_core.kv.buffer_pool import BufferPool, Charges
from ollm_core.memory.accounts import MemoryAccount
from ollm_core.memory.kinds import MemoryKind

_NUM_BUFFERS = 2  # blocks on the device: one is attended while the next is copied


class BlockUpload(Closing):
    """Two device buffers for each iterator that is alive."""

    def __init__(self, geometry: KVGeometry, bus: Bus, account: MemoryAccount | None) -> None:
        """The buffers are held in `account`, of the device. Raises DoesNotFitError."""
        self._geometry = geometry
        self._charges = Charges(account) if account else None
        largest = max(map(geometry.block_bytes, range(geometry.num_layers)))
        self._uploads = BufferPool(
            lambda: Upload(bus, largest, _NUM_BUFFERS),
            _NUM_BUFFERS * largest,
            MemoryKind.KV_UPLOAD,
            self._charges,
        )

    def sent(self, layer_idx: int, blocks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Blocks of a layer [2, G, block_size, D] on the device, valid until the next step."""
        with self._uploads.lane() as upload:
            for block in blocks:
                # A tail is written by operators that are called later: they come after its copy.
                sent = upload.send(block.view(-1).view(torch.uint8))
                try:
                    yield self._geometry.as_block(layer_idx, upload.receive(sent))
                finally:
                    upload.release(sent)

    def close(self) -> None:
        self._uploads.close()
        if self._charges:
            self._charges.close()
