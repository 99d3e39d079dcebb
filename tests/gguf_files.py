"""Writes tiny GGUF files: the Llama that a directory holds, as llama.cpp's converter would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_attention_layernorm": "ffn_norm",
    "input_layernorm": "attn_norm",
    "model.layers.": "blk.",
}


def write_gguf(
    path: Path, model: Any, keys: dict[str, Any] | None = None, tensors: Any = None
) -> Path:
    """The Llama `model` with a byte-level tokenizer. `keys` and `tensors` are put in, replace what
    is there, or take it out if None.
    """
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    for key, value in (_keys(model.config) | (keys or {})).items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_array(key, value)
    for name, value in (_tensors(model) | (tensors or {})).items():
        if value is not None:
            writer.add_tensor(name, np.ascontiguousarray(value, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _keys(config: Any) -> dict[str, Any]:
    letters = [chr(code) for code in range(33, 127)]
    rest = [f"<{i}>" for i in range(config.vocab_size - len(letters) - 5)]
    tokens = ["<pad>", "<s>", "</s>", *letters, "ab", "ac", *rest]
    return {
        "llama.block_count": config.num_hidden_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.rope.dimension_count": config.head_dim,
        "llama.rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, 3] + [1] * (len(tokens) - 3),
        "tokenizer.ggml.merges": ["a b", "a c"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
    }


def _tensors(model: Any) -> dict[str, Any]:
    found = {}
    for name, value in model.named_parameters():
        array = value.detach().numpy()
        for heads, part in (("num_attention_heads", "q_proj"), ("num_key_value_heads", "k_proj")):
            if part in name:
                num = getattr(model.config, heads)
                turned = array.reshape(num, 2, len(array) // num // 2, *array.shape[1:])
                array = turned.swapaxes(1, 2).reshape(array.shape)
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        found[name] = array
    inv_freq = model.model.rotary_emb.inv_freq
    parameters, size = model.config.rope_parameters, 2 * len(inv_freq)
    plain = 1.0 / (parameters["rope_theta"] ** (torch.arange(0, size, 2).float() / size))
    if parameters.get("rope_type", "default") != "default":
        found["rope_freqs.weight"] = (plain / inv_freq).numpy()
    return found
