"""The models that can be named by id, with the content of their config.json, and a tiny one."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from ollm_core import CatalogEntry

_COMMON: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "mlp_bias": False,
    "model_type": "llama",
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}


def _llama3(rope_factor: float, **sizes: Any) -> dict[str, Any]:
    """A Llama 3.1 or 3.2 instruct model."""
    return {
        **deepcopy(_COMMON),
        "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009],
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "rope_scaling": {
            "factor": rope_factor,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "vocab_size": 128256,
        **sizes,
    }


def _entry(
    model_id: str,
    repo: str,
    num_parameters: int,
    license_name: str,
    config: dict[str, Any],
    *aliases: str,
) -> CatalogEntry:
    """All of these checkpoints hold two bytes a parameter, and a tied head's tensor once."""
    return CatalogEntry(
        model_id,
        repo,
        num_parameters,
        2 * num_parameters,
        config,
        license=license_name,
        aliases=aliases,
    )


def entries() -> tuple[CatalogEntry, ...]:
    """New objects at every call: what transformers does to a config stays with that caller."""
    return (
        _entry(
            "llama3-1B-chat",
            "meta-llama/Llama-3.2-1B-Instruct",
            1_235_814_400,
            "llama3.2",
            _llama3(
                32.0,
                head_dim=64,
                hidden_size=2048,
                intermediate_size=8192,
                num_attention_heads=32,
                num_hidden_layers=16,
                tie_word_embeddings=True,
            ),
            "llama3.2:1b",
        ),
        _entry(
            "llama3-3B-chat",
            "meta-llama/Llama-3.2-3B-Instruct",
            3_212_749_824,
            "llama3.2",
            _llama3(
                32.0,
                head_dim=128,
                hidden_size=3072,
                intermediate_size=8192,
                num_attention_heads=24,
                num_hidden_layers=28,
                tie_word_embeddings=True,
            ),
            "llama3.2:3b",
            "llama3.2",
        ),
        _entry(
            "llama3-8B-chat",
            "meta-llama/Llama-3.1-8B-Instruct",
            8_030_261_248,
            "llama3.1",
            _llama3(
                8.0,
                hidden_size=4096,
                intermediate_size=14336,
                num_attention_heads=32,
                num_hidden_layers=32,
                tie_word_embeddings=False,
            ),
            "llama3.1:8b",
            "llama3.1",
        ),
        _entry(
            "llama3-405B-chat",
            "meta-llama/Llama-3.1-405B-Instruct",
            405_853_388_800,
            "llama3.1",
            _llama3(
                8.0,
                hidden_size=16384,
                intermediate_size=53248,
                num_attention_heads=128,
                num_hidden_layers=126,
                tie_word_embeddings=False,
            ),
            "llama3.1:405b",
        ),
        _entry(
            "llama2-70B-chat",
            "meta-llama/Llama-2-70b-chat-hf",
            68_976_648_192,
            "llama2",
            {
                **deepcopy(_COMMON),
                "bos_token_id": 1,
                "eos_token_id": 2,
                "hidden_size": 8192,
                "intermediate_size": 28672,
                "max_position_embeddings": 4096,
                "num_attention_heads": 64,
                "num_hidden_layers": 80,
                "num_key_value_heads": 8,
                "rope_scaling": None,
                "tie_word_embeddings": False,
                "torch_dtype": "float16",
                "vocab_size": 32000,
            },
            "llama2:70b",
        ),
        _entry(
            "smollm2-135M",
            "HuggingFaceTB/SmolLM2-135M-Instruct",
            134_515_008,
            "apache-2.0",
            {
                **deepcopy(_COMMON),
                "bos_token_id": 1,
                "eos_token_id": 2,
                "hidden_size": 576,
                "initializer_range": 0.041666666666666664,
                "intermediate_size": 1536,
                "is_llama_config": True,
                "max_position_embeddings": 8192,
                "num_attention_heads": 9,
                "num_hidden_layers": 30,
                "num_key_value_heads": 3,
                "pad_token_id": 2,
                "rope_interleaved": False,
                "rope_scaling": None,
                "rope_theta": 100000,
                "tie_word_embeddings": True,
                "vocab_size": 49152,
            },
            "smollm2:135m",
        ),
    )


def tiny() -> dict[str, Any]:
    """A small config with every feature of the family."""
    return {
        **deepcopy(_COMMON),
        "attention_bias": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "head_dim": 32,
        "hidden_size": 64,
        "intermediate_size": 160,
        "max_position_embeddings": 2048,
        "mlp_bias": True,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "rope_scaling": {
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 64,
            "rope_type": "llama3",
        },
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "vocab_size": 256,
    }
