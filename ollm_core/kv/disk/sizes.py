"""Sizes of KV on disk: slots in the files, and the buffers for reading and writing."""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping

from ollm_core.contracts.kv import KVGeometry, TierBytes
from ollm_core.device.buffers import round_up

STAGING_BYTES = 4 << 20
"""One read: large enough for the full speed of the disk. An iterator has two such buffers."""
NUM_WRITE_BUFFERS = 4
"""Full blocks that may wait to be written before `append` waits too."""


class DiskSizes:
    """What blocks on disk take of each memory."""

    def __init__(self, geometry: KVGeometry, staging_bytes: int = STAGING_BYTES) -> None:
        layers = range(geometry.num_layers)
        self.slot_bytes = [round_up(geometry.block_bytes(layer_idx)) for layer_idx in layers]
        """Of each layer: a block in its file, or its tail in memory."""
        self.run_slots = [max(staging_bytes // size, 1) for size in self.slot_bytes]
        """Slots of each layer that are read together."""
        self.lane_bytes = max(map(operator.mul, self.run_slots, self.slot_bytes), default=0)
        """One of the two buffers that an iterator reads into."""
        self.write_bytes = NUM_WRITE_BUFFERS * sum(set(self.slot_bytes))
        """Full blocks on their way to the disk."""

    def growth(self, num_blocks: Mapping[int, int], tails: Collection[int]) -> TierBytes:
        """What so many more slots of each layer, and a tail for each of `tails`, take."""
        return TierBytes(
            host=sum(self.slot_bytes[layer_idx] for layer_idx in tails),
            disk=sum(n * self.slot_bytes[layer_idx] for layer_idx, n in num_blocks.items()),
        )
