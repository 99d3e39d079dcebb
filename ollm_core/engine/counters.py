"""What a model has done since it was opened: every count is written here, as a field of Stats.

A new counter is a field of `ollm_core.contracts.progress.Stats`, and a line where it is counted.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace

from ollm_core.contracts.progress import Stats
from ollm_core.engine.batch import NewTokens, num_new_tokens, stage_of
from ollm_core.engine.pass_planner import PassPlan
from ollm_core.memory.accounts import Accounts
from ollm_core.memory.host import peak_process_bytes
from ollm_core.weights.eviction import Eviction
from ollm_core.weights.streamer import TieredStreamer


class Counters:
    """Counts what the engine, generation and drafts do; reads what weights, memory and eviction
    have counted of themselves. Threads may share it.
    """

    def __init__(self) -> None:
        self.last_plan: PassPlan | None = None
        """How the last pass was run."""
        self._lock = threading.Lock()
        self._counted = Stats()

    @property
    def counted(self) -> Stats:
        """What was counted here so far; what other parts of the model count is 0 there."""
        return self._counted

    def count_pass(
        self, work: Sequence[NewTokens], plan: PassPlan, seconds: float, kv_bytes_read: int
    ) -> None:
        """A pass over `work` is through."""
        self.last_plan = plan
        counts: dict[str, float] = {"weight_passes": 1, "kv_bytes_read": kv_bytes_read}
        if stage_of(work) == "prefill":
            counts |= {"prefill_tokens": num_new_tokens(work), "prefill_seconds": seconds}
        else:
            num_drafted = sum(item.num_drafted for item in work)
            counts |= {"decode_tokens": len(work), "decode_seconds": seconds}
            counts |= {"drafted_tokens": num_drafted, "undrafted_passes": int(num_drafted == 0)}
        self._add(**counts)

    def count_kv_on_disk(self, num_bytes: int) -> None:
        """A store holds `num_bytes` on disk now; the largest number counts."""
        self._put(kv_disk_bytes=max(self._counted.kv_disk_bytes, num_bytes))

    def count_cache(self, kv_tier: str) -> None:
        """A cache was opened."""
        self._put(kv_tier=kv_tier)

    def count_cached(self, num_tokens: int) -> None:
        """So many tokens of prompts were found in the prefix cache."""
        self._add(cached_tokens=num_tokens)

    def count_accepted(self, num_tokens: int) -> None:
        """Drafted tokens were right: a pass has given so many more than the one it counted for."""
        self._add(decode_tokens=num_tokens, accepted_tokens=num_tokens)

    def count_drafting(self, seconds: float) -> None:
        """A draft source took time between two passes."""
        self._add(decode_seconds=seconds)

    def stats(
        self,
        weights: TieredStreamer,
        accounts: Accounts,
        eviction: Eviction | None,
        *,
        weight_bytes: int,
    ) -> Stats:
        """All of it, and what the parts of the model have counted of themselves. `weight_bytes` are
        those of the checkpoint.
        """
        plan, experts, uploads = self.last_plan, weights.expert_counters, weights.uploads
        return replace(
            self._counted,
            weight_bytes=weight_bytes,
            resident_bytes=weights.resident_bytes,
            device_limit_bytes=accounts.device.limit,
            device_peak_bytes=accounts.device.peak,
            host_limit_bytes=accounts.host.limit,
            host_peak_bytes=accounts.host.peak,
            process_peak_bytes=peak_process_bytes(),
            weight_bytes_read=weights.bytes_read,
            read_seconds=weights.read_seconds,
            waited_seconds=weights.waited_seconds,
            reader=weights.reader,
            attention=plan.attention if plan else "",
            chunk_size=plan.chunk_size if plan else 0,
            experts_routed=experts.routed,
            experts_hit=experts.hit,
            experts_read=experts.read,
            expert_bytes_read=experts.bytes_read,
            device_layers=weights.num_device_layers,
            host_layers=weights.num_host_layers,
            times_short=eviction.shortage.times if eviction else 0,
            most_given_up_bytes=eviction.shortage.most_bytes if eviction else 0,
            uploaded_bytes=uploads.num_bytes,
            upload_seconds=uploads.copy_seconds,
            upload_waited_seconds=uploads.waited_seconds,
        )

    def _add(self, **amounts: float) -> None:
        """Raise fields of Stats."""
        with self._lock:
            counted = self._counted
            sums = {name: getattr(counted, name) + amount for name, amount in amounts.items()}
            self._counted = replace(counted, **sums)

    def _put(self, **values: str | int) -> None:
        """Set fields of Stats."""
        with self._lock:
            self._counted = replace(self._counted, **values)  # type: ignore[arg-type]
