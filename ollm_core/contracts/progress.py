"""What a running model tells: progress of a pass, and counters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    pass


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a weight pass is, or a reading of the model's files before one. Sent to `on_progress`
    after every step of work; cheap to ignore.
    """

    stage: Literal["check", "prefill", "decode"]
    """"prefill" while a pass brings more than one new token per sequence. "check" while files are
    hashed, to know the model's KV in a `kv_dir`: once for each model, then their hashes are known.
    """
    steps_done: int
    steps_total: int
    """A step is one chunk of tokens through one layer, or one part of the head. A layer with routed
    experts is two: its mixer and its MLP. In "check", a byte.
    """
    num_new_tokens: int
    """New tokens in this pass, over all sequences."""
    weight_passes: int
    """Passes finished before this one."""
    weight_bytes_read: int
    """Since the model was opened; in "check", of those that are hashed."""
    given_up_bytes: int = 0
    """Of weights that are not kept in this pass, because others took the machine's memory."""


@dataclass(frozen=True, slots=True)
class Stats:
    """What a model has done since it was opened. Sizes are bytes; `model.stats` makes a new one at
    each call.
    """

    weight_bytes: int
    """All parameters of the model as stored in the checkpoint."""
    resident_bytes: int
    """Of those, kept in memory between passes."""
    device_limit_bytes: int
    device_peak_bytes: int
    host_limit_bytes: int
    host_peak_bytes: int
    process_peak_bytes: int
    """Of the whole process, interpreter and libraries included; 0 where the system does not
    tell.
    """
    weight_bytes_read: int
    """Read from storage by the weight streamer, loading of resident weights not counted."""
    read_seconds: float
    """Time the reading engine spent reading those."""
    weight_passes: int
    kv_tier: str
    kv_bytes_read: int
    kv_disk_bytes: int
    """Largest so far."""
    cached_tokens: int
    """Of prompts, found in a kept prefix and not computed again."""
    prefill_tokens: int
    prefill_seconds: float
    decode_tokens: int
    decode_seconds: float
    """Of passes, and of the draft source between them."""
    reader: str
    """The reading engine in use, by name."""
    attention: str
    chunk_size: int
    experts_routed: int = 0
    """Experts that a layer asked for in a pass, each counted once for each layer and pass."""
    experts_hit: int = 0
    """Of those, found in memory."""
    experts_read: int = 0
    """Of those, read from storage."""
    expert_bytes_read: int = 0
    """For those. What fills free room counts here, and not in `weight_bytes_read`."""
    device_layers: int = 0
    """Layers that are kept on the device between passes."""
    host_layers: int = 0
    """Layers that are kept in host memory, beside a GPU."""
    times_short: int = 0
    """How often memory ran short and kept weights gave way."""
    most_given_up_bytes: int = 0
    """The most of them that were not kept for it in a pass."""
    drafted_tokens: int = 0
    """Tokens that were drafted and checked."""
    accepted_tokens: int = 0
    """Of those that the model's draft source guessed, how many were right."""
    undrafted_passes: int = 0
    """Weight passes of decoding that checked no draft."""
    uploaded_bytes: int = 0
    """Of weights, copied to a device with memory of its own."""
    upload_seconds: float = 0.0
    """That these copies took on the device; measured with a profile alone."""
    upload_waited_seconds: float = 0.0
    """Of those, compute waited; the rest ran beside it. Measured with a profile alone."""
