"""Reports a run from its Stats: fields for `--json`, and the summary for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ollm_core.memory.sizes import format_size

if TYPE_CHECKING:
    from ollm_core.contracts.progress import Stats
    from ollm_core.text.answer_form import Said


def json_report(
    said: Said, token_ids: list[int], num_prompt_tokens: int, stats: Stats, drafting: bool = False
) -> dict[str, object]:
    """The fields of `--json`. Those that are counters alone are named where Stats declares them."""
    return {
        "text": said.text,
        **({"reasoning": said.thoughts} if said.thoughts else {}),
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
    weights_read = (
        f"{format_size(stats.weight_bytes_read / passes)} per pass, "
        f"{stats.weight_passes} passes, {format_size(read_rate)}/s ({stats.reader})"
        if stats.weight_bytes_read
        else f"none in {stats.weight_passes} passes: all are resident"
    )
    on_disk = ""
    if stats.kv_tier == "disk":
        on_disk = f", {format_size(stats.kv_disk_bytes)}, {format_size(stats.kv_bytes_read)} read"
    lines = {
        "model": f"{format_size(stats.weight_bytes)}, {format_size(stats.resident_bytes)} resident",
        "device memory": f"peak {format_size(stats.device_peak_bytes)} / "
        f"limit {format_size(stats.device_limit_bytes)}",
        "host memory": f"peak {format_size(stats.host_peak_bytes)} / "
        f"limit {format_size(stats.host_limit_bytes)}; "
        f"whole process {format_size(stats.process_peak_bytes)}",
        "weights read": weights_read,
        "prefix cache": f"{stats.cached_tokens} prompt tokens reused",
        "prefill": f"{stats.prefill_tokens} tokens in {stats.prefill_seconds:.1f} s, "
        f"{prefill_rate:.1f} tokens/s",
        "decode": f"{stats.decode_tokens} tokens in {stats.decode_seconds:.1f} s, "
        f"{decode_rate:.2f} tokens/s",
        "KV cache": f"on {stats.kv_tier}{on_disk}",
    }
    if stats.experts_routed:
        lines["experts"] = (
            f"{stats.experts_routed} routed, {stats.experts_hit} of them resident, "
            f"{format_size(stats.expert_bytes_read)} read"
        )
    for name, kept, asked in (
        ("device", stats.device_layers, device_layers),
        ("host", stats.host_layers, host_layers),
    ):
        if asked is not None:
            lines[f"{name} layers"] = f"{kept} resident, your limit is {asked}"
    if stats.times_short:
        lines["memory short"] = (
            f"{stats.times_short} times; up to {format_size(stats.most_given_up_bytes)} of weights "
            "evicted, and read again later"
        )
    if drafting:
        lines["drafts"] = (
            f"accepted {stats.accepted_tokens}/{stats.drafted_tokens} draft tokens; "
            f"{stats.undrafted_passes} passes without a draft"
        )
    return "\n".join(f"{name:<14}{value}" for name, value in lines.items())


def _rate(amount: int, seconds: float) -> float:
    return amount / seconds if seconds > 0 else 0.0
