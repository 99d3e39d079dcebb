"""Progress of a weight pass, and the counters of a running model (Stats)."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a weight pass is, or a reading of the model's files before one. Sent to `on_progress`
    after every step of work, and when more of it is saved; cheap to ignore.
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
    num_layers: int = 0
    """Of the model; 0 in "check"."""
    resumed_layers: int = 0
    """Layers of this pass that an earlier run has computed: it went on after them."""
    saved_layers: int = 0
    """Layers of this pass that another run would not compute again."""


_JSON = {"json": "always"}
_JSON_OF_EXPERTS = {"json": "experts"}
_JSON_OF_DRAFTS = {"json": "drafts"}
"""Fields of Stats that `ollm run --json` tells, in their order: always, or of a model with routed
experts, or of a run with a draft source.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """What a model has done since it was opened. Sizes are bytes; `model.stats` makes a new one at
    each call.
    """

    weight_bytes: int = 0
    """All parameters of the model as stored in the checkpoint."""
    resident_bytes: int = 0
    """Of those, kept in memory between passes."""
    device_limit_bytes: int = 0
    device_peak_bytes: int = field(default=0, metadata=_JSON)
    host_limit_bytes: int = 0
    host_peak_bytes: int = field(default=0, metadata=_JSON)
    process_peak_bytes: int = 0
    """Of the whole process, interpreter and libraries included; 0 where the system does not
    tell.
    """
    weight_bytes_read: int = field(default=0, metadata=_JSON)
    """Read from storage by the weight streamer, loading of resident weights not counted."""
    read_seconds: float = 0.0
    """Time the reading engine spent reading those."""
    waited_seconds: float = 0.0
    """Time that passes have waited for weights, the loading of resident ones included. Beside a
    GPU, the host's.
    """
    reader: str = ""
    """The reading engine in use, by name."""
    kv_tier: str = ""
    """Of the last cache."""
    kv_bytes_read: int = field(default=0, metadata=_JSON)
    kv_disk_bytes: int = 0
    """Largest so far."""
    weight_passes: int = field(default=0, metadata=_JSON)
    attention: str = ""
    """Of the last pass."""
    chunk_size: int = 0
    """Of the last pass."""
    cached_tokens: int = 0
    """Of prompts, found in a kept prefix and not computed again."""
    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    """Of passes, and of the draft source between them."""
    device_layers: int = 0
    """Layers that are kept on the device between passes."""
    host_layers: int = 0
    """Layers that are kept in host memory, beside a GPU."""
    times_short: int = field(default=0, metadata=_JSON)
    """How often memory ran short and kept weights gave way."""
    most_given_up_bytes: int = 0
    """The most of them that were not kept for it in a pass."""
    experts_routed: int = field(default=0, metadata=_JSON_OF_EXPERTS)
    """Experts that a layer asked for in a pass, each counted once for each layer and pass."""
    experts_hit: int = field(default=0, metadata=_JSON_OF_EXPERTS)
    """Of those, found in memory."""
    experts_read: int = field(default=0, metadata=_JSON_OF_EXPERTS)
    """Of those, read from storage."""
    expert_bytes_read: int = field(default=0, metadata=_JSON_OF_EXPERTS)
    """For those. What fills free room counts here, and not in `weight_bytes_read`."""
    drafted_tokens: int = field(default=0, metadata=_JSON_OF_DRAFTS)
    """Tokens that were drafted and checked."""
    accepted_tokens: int = field(default=0, metadata=_JSON_OF_DRAFTS)
    """Of those that the model's draft source guessed, how many were right."""
    undrafted_passes: int = field(default=0, metadata=_JSON_OF_DRAFTS)
    """Weight passes of decoding that checked no draft."""
    uploaded_bytes: int = 0
    """Of weights, copied to a device with memory of its own."""
    upload_seconds: float = 0.0
    """That these copies took on the device; measured with a profile alone."""
    upload_waited_seconds: float = 0.0
    """Of those, compute waited; the rest ran beside it. Measured with a profile alone."""

    def for_json(self, *, drafting: bool) -> dict[str, int]:
        """What `ollm run --json` tells of it, by name; of drafts where `drafting`."""
        told = {"always": True, "experts": self.experts_routed > 0, "drafts": drafting}
        return {
            one.name: getattr(self, one.name)
            for one in fields(self)
            if told.get(one.metadata.get("json", ""))
        }
