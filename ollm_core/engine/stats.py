"""What an opened model has done so far, gathered from the parts that counted it."""

from __future__ import annotations

from ollm_core.contracts.progress import Stats
from ollm_core.engine.engine import Engine
from ollm_core.memory.accounts import Accounts
from ollm_core.memory.host import peak_process_bytes
from ollm_core.weights.streamer import TieredWeights


def gather_stats(
    engine: Engine, weights: TieredWeights, accounts: Accounts, *, weight_bytes: int, kv_tier: str
) -> Stats:
    """`weight_bytes` are those of the checkpoint, `kv_tier` that of the last cache."""
    counters, plan = engine.counters, engine.counters.last_plan
    experts, pressure, uploads = weights.expert_counters, engine.pressure, weights.uploads
    return Stats(
        weight_bytes=weight_bytes,
        resident_bytes=weights.resident_bytes,
        device_limit_bytes=accounts.device.limit,
        device_peak_bytes=accounts.device.peak,
        host_limit_bytes=accounts.host.limit,
        host_peak_bytes=accounts.host.peak,
        process_peak_bytes=peak_process_bytes(),
        weight_bytes_read=weights.bytes_read,
        read_seconds=weights.read_seconds,
        weight_passes=counters.weight_passes,
        kv_tier=kv_tier,
        kv_bytes_read=counters.kv_bytes_read,
        kv_disk_bytes=counters.kv_disk_bytes,
        cached_tokens=counters.cached_tokens,
        prefill_tokens=counters.prefill_tokens,
        prefill_seconds=counters.prefill_seconds,
        decode_tokens=counters.decode_tokens,
        decode_seconds=counters.decode_seconds,
        reader=weights.reader,
        attention=plan.attention if plan else "",
        chunk_size=plan.chunk_size if plan else 0,
        experts_routed=experts.routed,
        experts_hit=experts.hit,
        experts_read=experts.read,
        expert_bytes_read=experts.bytes_read,
        device_layers=weights.num_device_layers,
        host_layers=weights.num_host_layers,
        times_short=pressure.shortage.times if pressure else 0,
        most_given_up_bytes=pressure.shortage.most_bytes if pressure else 0,
        drafted_tokens=counters.drafted_tokens,
        accepted_tokens=counters.accepted_tokens,
        undrafted_passes=counters.undrafted_passes,
        uploaded_bytes=uploads.num_bytes,
        upload_seconds=uploads.copy_seconds,
        upload_waited_seconds=uploads.waited_seconds,
    )
