"""Makes a tiny config of any causal model type, out of what its config class assumes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import PreTrainedConfig

HIDDEN, HEADS, HEAD_DIM, INNER, VOCAB, WINDOW, EXPERTS = 64, 4, 16, 96, 256, 24, 8
MOST_LAYERS = 6
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "depth")
_HEADS = (
    "num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads",
    "swa_num_attention_heads", "linear_num_value_heads", "mamba_n_heads", "mamba_num_heads",
    "encoder_attention_heads", "linear_num_heads",
)  # fmt: skip
_KV_HEADS = (
    "num_key_value_heads", "num_global_key_value_heads", "swa_num_key_value_heads",
    "linear_num_key_heads", "num_kv_heads", "n_head_kv",
)  # fmt: skip
CHANGES: Mapping[str, Mapping[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere_compass_text": {
        "rope_parameters": {
            one: {"rope_type": "default", "rope_theta": 10000.0}
            for one in ("full_attention", "sliding_attention")
        }
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": INNER, "moe_num_experts": EXPERTS, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots1": {"n_routed_experts": EXPERTS, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "blenderbot": {"encoder_layers": 4},  # transformers' cache has as many
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "dots3_note": {
        "vision_config": {
            "num_hidden_layers": 2, "mlp_layer_types": ["dense"] * 2, "adapter_out_dim": HIDDEN,
        },
        "audio_config": {"num_hidden_layers": 2, "adapter_out_dim": HIDDEN},
    },
    "dots3_note_text": {"head_dim": 2 * HEAD_DIM},
    "falcon_h1": {"mamba_d_head": 32, "mamba_d_ssm": 128},
    "gemma3n_text": {"num_kv_shared_layers": 2},
    "granitemoehybrid": {
        "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"]
    },
    "hunyuan_v1_dense": {"head_dim": HEAD_DIM},
    "hunyuan_v1_moe": {"head_dim": HEAD_DIM},
    "jamba": {
        "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "mamba2": {"num_heads": HEADS, "head_dim": 32},
    "ministral": {"head_dim": HEAD_DIM},
    "gemma4_assistant": {
        "text_config": {
            "model_type": "gemma4_text", "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0, "num_hidden_layers": 4,
        }
    },
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": HEAD_DIM,
        "indexer_budget": 16, "indexer_compress_ratio": 4,
    },
    "reformer": {"axial_pos_embds_dim": (HIDDEN // 4, HIDDEN - HIDDEN // 4)},
    "xmod": {"languages": ["en_XX", "de_DE"], "default_language": "de_DE"},
    "xlstm": {"num_blocks": 4, "qk_dim_factor": 1.0},  # whose states are rounded up
    "hrm_text": {"num_layers_per_stack": 2, "num_hidden_layers": 16},
    "emu3": {"vocabulary_map": {"<image>": 250, "<|extra_200|>": 251}},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"]},
    "zamba": {"layers_block_type": ["linear_attention", "linear_attention", "hybrid", "hybrid"]},
}  # fmt: skip
"""What a type needs beside, where its defaults make no model, or not one of every kind of layer."""
_PARTS = (
    "text_config", "llm_config", "patcher_config", "encoder_config", "decoder_config",
    "global_config",
)  # fmt: skip
_CHOSEN = (
    "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts",
    "moe_top_k", "experts_per_token",
)  # fmt: skip
_GROUPS = "n_group", "num_expert_group", "topk_group"
_PLAIN: Mapping[str, int] = {
    "hidden_size": HIDDEN, "n_embd": HIDDEN, "d_model": HIDDEN, "embedding_size": HIDDEN,
    "word_embed_proj_dim": HIDDEN, "emb_dim": HIDDEN,
    "lru_width": HIDDEN, "dim_model": HIDDEN, "input_embedding_size": HIDDEN,
    "output_embedding_size": HIDDEN, "embedding_dim": HIDDEN,
    "head_dim": HEAD_DIM, "global_head_dim": 2 * HEAD_DIM, "qk_nope_head_dim": HEAD_DIM,
    "qk_rope_head_dim": 8, "qk_head_dim": HEAD_DIM + 8, "v_head_dim": HEAD_DIM,
    "swa_head_dim": HEAD_DIM, "swa_v_head_dim": HEAD_DIM, "kv_channels": HEAD_DIM,
    "linear_head_dim": HEAD_DIM, "linear_key_head_dim": HEAD_DIM,
    "linear_value_head_dim": HEAD_DIM, "d_kv": HEAD_DIM,
    "dim_head": HEAD_DIM, "rotary_dim": 8,
    "intermediate_size": INNER, "ffn_dim": INNER, "n_inner": INNER, "dff": INNER, "d_ff": INNER,
    "dim_ff": INNER, "moe_intermediate_size": INNER // 2, "intermediate_size_mlp": INNER,
    "shared_expert_intermediate_size": INNER, "shared_intermediate_size": INNER,
    "moe_shared_expert_intermediate_size": INNER, "ffn_hidden_size": INNER,
    "dense_intermediate_size": INNER, "prefix_dense_intermediate_size": INNER,
    "expert_ffn_hidden_size": INNER // 2, "decoder_ffn_dim": INNER, "encoder_ffn_dim": INNER,
    "block_ff_dim": INNER, "mlp_hidden_size": INNER,
    "vocab_size": VOCAB, "decoder_vocab_size": VOCAB, "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 16, "laurel_rank": 8,
    "sliding_window": WINDOW, "attention_window_size": WINDOW, "window_size": WINDOW,
    "local_attention": 2 * WINDOW, "attention_chunk_size": WINDOW, "sliding_window_size": WINDOW,
    "num_experts": EXPERTS, "num_local_experts": EXPERTS, "n_routed_experts": EXPERTS,
    "moe_num_experts": EXPERTS, "num_routed_experts": EXPERTS, "zero_expert_num": 2,
    "q_lora_rank": 24, "kv_lora_rank": 16, "o_lora_rank": 8, "index_head_dim": 16,
    "index_n_heads": 16, "index_topk": 16,
    "mamba_d_state": 8, "state_size": 8, "ssm_state_size": 8, "mamba_d_head": 32,
    "mamba_head_dim": 32, "time_step_rank": 4, "mamba_dt_rank": 4, "mamba_d_ssm": 128,
    "chunk_size": 64, "mamba_chunk_size": 64, "mamba_expand": 2,
    "mamba_latent_size": HIDDEN, "moe_latent_size": None or HIDDEN,
    "max_position_embeddings": 512, "n_positions": 512, "max_seq_len": 512, "n_ctx": 512,
    "num_nextn_predict_layers": 0, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "adapter_rank": 8, "use_mem_rank": 8, "decoder_start_token_id": 1,
}  # fmt: skip


def tiny_config(model_type: str, **changes: Any) -> Any:
    """The config of a small model, an object of transformers: flags as they are by default, sizes
    small, every kind of layer kept.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = CONFIG_MAPPING[model_type]
    own = CHANGES.get(model_type, {})
    try:
        default = kind()
    except StrictDataclassClassValidationError:  # its defaults contradict each other
        default = kind(**own)
    given = shrink(default, model_type)
    if "is_decoder" in given:
        given["is_decoder"] = True
    if given.get("is_encoder_decoder"):  # as transformers saves its decoder
        given["is_encoder_decoder"] = False
    given |= {**own, **changes}
    return kind(**given)


def shrink(config: Any, model_type: str = "") -> dict[str, Any]:
    """The arguments of a small config of the class of `config`."""
    stated = config.to_dict()
    for gone in ("model_type", "transformers_version", "architectures", "_name_or_path"):
        stated.pop(gone, None)
    for key in _computed(config, stated):
        del stated[key]
    for key, value in list(stated.items()):
        part = getattr(config, key) if isinstance(value, Mapping) else None
        if isinstance(value, Mapping) and key.endswith(_PARTS):
            stated[key] = {**shrink(part), **CHANGES.get(part.model_type, {})}
        elif isinstance(part, PreTrainedConfig) and not value.get("per_layer_config"):
            layers = ((name, value.get(name)) for name in (*_LAYERS, "num_blocks"))
            few = {name: min(count, 2) for name, count in layers if type(count) is int}
            stated[key] = {**value, **few}
    num_layers = next((stated[k] for k in _LAYERS if isinstance(stated.get(k), int)), 0)
    kept = _kept_layers(stated, num_layers)
    heads = next((stated[k] for k in _HEADS if isinstance(stated.get(k), int)), 0)
    small: dict[str, Any] = {}
    for key, value in stated.items():
        small[key] = value
        if key in _LAYERS and isinstance(value, int) and value == num_layers:
            small[key] = len(kept)
        elif isinstance(value, list) and num_layers and len(value) == num_layers:
            small[key] = [value[i] for i in kept]
        elif key in _HEADS and isinstance(value, int):
            small[key] = HEADS
        elif key in _KV_HEADS and isinstance(value, int):
            whole = heads or value
            small[key] = HEADS if value >= whole else max(1, min(2, HEADS * value // whole or 1))
        elif key in _PLAIN and isinstance(value, int) and not isinstance(value, bool):
            if value > 0 or key.endswith("token_id"):
                small[key] = _PLAIN[key] if key.endswith("token_id") else min(value, _PLAIN[key])
        elif key in _CHOSEN:
            small[key] = min(value, 2) if isinstance(value, int) else value
        elif key in _GROUPS and isinstance(value, int):
            small[key] = min(value, 1 if key == "topk_group" else 2)
        elif key in ("mamba_n_groups", "n_groups") and isinstance(value, int):
            small[key] = min(value, 2)
        elif key.endswith("token_id") and isinstance(value, int) and value >= VOCAB:
            small[key] = 3
    own = {int(i): one for i, one in (stated.get("per_layer_config") or {}).items()}
    if own:
        small["per_layer_config"] = {
            str(place): {
                key: value * small[key] // stated[key]
                if type(value) is int and type(stated.get(key)) is int and stated[key]
                else value
                for key, value in own[i].items()
            }
            for place, i in enumerate(kept)
            if i in own
        }
    rotary = stated.get("qk_rope_head_dim")
    if rotary and stated.get("head_dim") == rotary:
        small["head_dim"] = small["qk_rope_head_dim"]
    if isinstance(small.get("eos_token_id"), list):
        small["eos_token_id"] = 2
    return small


def _computed(config: Any, stated: Mapping[str, Any]) -> list[str]:
    """What the config class computes of other keys where it is not given, but for what is made
    small here: sizes without a default, sizes and lists that the class does not name.
    """
    fields = type(config).__dataclass_fields__
    made_small = {*_PLAIN, *_LAYERS, *_HEADS, *_KV_HEADS, *_CHOSEN, *_GROUPS, "num_blocks"}
    num_layers = next((stated[k] for k in _LAYERS if isinstance(stated.get(k), int)), 0)

    def computed(key: str, value: Any) -> bool:
        if isinstance(value, list):
            return key not in fields and key != "architectures" and len(value) != num_layers
        size = type(value) is int and value > 1 and key not in made_small
        named = key in fields and fields[key].default is not None
        return size and not named and not key.endswith(("token_id", "vocab_size", "per_stack"))

    return [key for key, value in stated.items() if computed(key, value)]


def _kept_layers(stated: Mapping[str, Any], num_layers: int) -> list[int]:
    """Numbers of layers of every kind that the config lists, in order: at most MOST_LAYERS."""
    if num_layers <= 4:
        return list(range(num_layers))
    lists: list[Any] = [v for v in stated.values() if isinstance(v, list) and len(v) == num_layers]
    own = {int(i): one for i, one in (stated.get("per_layer_config") or {}).items()}
    lists.append([sorted(own.get(i, {})) for i in range(num_layers)])
    kept, seen = [], set()
    for i in range(num_layers):
        kind = tuple(repr(one[i]) for one in lists)
        if kind not in seen:
            seen.add(kind)
            kept.append(i)
    fill = (i for i in range(num_layers) if i not in kept)
    while len(kept) < 4:
        kept.append(next(fill))
    return sorted(kept)[:MOST_LAYERS]
