"""What a run has cost, from its Stats: fields of JSON, and lines for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ollm_core.memory.sizes import format_size

if TYPE_CHECKING:
    from ollm_core.contracts.progress import Stats


def json_report(
    text: str, token_ids: list[int], num_prompt_tokens: int, stats: Stats, drafting: bool = False
) -> dict[str, object]:
    """The fields of `--json`. Those that are counters alone are named where Stats declares them."""
    return {
        "text": text,
        "token_ids": token_ids,
        "num_prompt_tokens": num_prompt_tokens,
        "num_cached_tokens": stats.cached_tokens,
        "num_new_tokens": len(token_ids),
        "prefill_seconds": stats.prefill_seconds,
        "decode_tokens_per_second": _rate(stats.decode_tokens, stats.decode_seconds),
        **stats.for_json(drafting=drafting),
    }


def summary(
    stats: Stats,
    device_layers: int | None = None,
    host_layers: int | None = None,
    *,
    drafting: bool = False,
) -> str:
    """What the run cost, a line each; of layers where a number was asked for."""
    passes = max(stats.weight_passes, 1)
    read_rate = _rate(stats.weight_bytes_read, stats.read_seconds)
    prefill_rate = _rate(stats.prefill_tokens, stats.prefill_seconds)
    decode_rate = _rate(stats.decode_tokens, stats.decode_seconds)
    lines = {
        "model": f"{format_size(stats.weight_bytes)}, {format_size(stats.resident_bytes)} of it "
        "kept in memory",
        "device memory": f"peak {format_size(stats.device_peak_bytes)} of "
        f"{format_size(stats.device_limit_bytes)} allowed",
        "host memory": f"peak {format_size(stats.host_peak_bytes)} of "
        f"{format_size(stats.host_limit_bytes)} allowed; "
        f"whole process {format_size(stats.process_peak_bytes)}",
        "weights read": f"{format_size(stats.weight_bytes_read / passes)} per pass, "
        f"{stats.weight_passes} passes, {format_size(read_rate)}/s ({stats.reader})",
        "cached": f"{stats.cached_tokens} tokens of the prompt, not computed again",
        "prefill": f"{stats.prefill_tokens} tokens in {stats.prefill_seconds:.1f} s, "
        f"{prefill_rate:.1f} tokens/s",
        "decode": f"{stats.decode_tokens} tokens in {stats.decode_seconds:.1f} s, "
        f"{decode_rate:.2f} tokens/s",
        "KV cache": f"on {stats.kv_tier}, {format_size(stats.kv_disk_bytes)} on disk, "
        f"{format_size(stats.kv_bytes_read)} read",
    }
    if stats.experts_routed:
        lines["experts"] = (
            f"{stats.experts_routed} routed to, {stats.experts_hit} of them in memory, "
            f"{format_size(stats.expert_bytes_read)} read"
        )
    for name, kept, asked in (
        ("device", stats.device_layers, device_layers),
        ("host", stats.host_layers, host_layers),
    ):
        if asked is not None:
            lines[f"{name} layers"] = f"{kept} kept, at most {asked} asked for"
    if stats.times_short:
        lines["memory short"] = (
            f"{stats.times_short} times; up to {format_size(stats.most_given_up_bytes)} of weights "
            "were not kept for it, and read again"
        )
    if drafting:
        lines["drafts"] = (
            f"{stats.accepted_tokens} of {stats.drafted_tokens} tokens right, "
            f"{stats.undrafted_passes} passes without"
        )
    return "\n".join(f"{name:<14}{value}" for name, value in lines.items())


def _rate(amount: int, seconds: float) -> float:
    return amount / seconds if seconds > 0 else 0.0
