"""Write a random Llama to measure with: bf16 safetensors, a file per layer, no tokenizer.

usage: make_checkpoint.py OUT [--hidden 2048 --intermediate 5632 --layers 24 --heads 16
                               --kv-heads 4 --vocab 49152]

The default shape is 1.28 B parameters, 2.57 GB. The same arguments give the same weights. One file
is in memory at a time, so a checkpoint can be larger than memory.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a Llama."""

    hidden: int = 2048
    intermediate: int = 5632
    layers: int = 24
    heads: int = 16
    kv_heads: int = 4
    vocab: int = 49152

    def config(self) -> dict[str, object]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.hidden // self.heads,
            "vocab_size": self.vocab,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 2,
            "dtype": "bfloat16",
        }


def write_checkpoint(out: Path, shape: Shape, device: str = "cpu") -> int:
    """Write the checkpoint into directory `out`, made if need be; returns the bytes of its tensors.

    The random numbers are drawn on `device`: a GPU is much faster, and gives other ones.
    """
    out.mkdir(parents=True, exist_ok=True)
    num_files = shape.layers + 2
    weight_map: dict[str, str] = {}
    total_bytes = 0
    for number, tensors in enumerate(_parts(shape, device), start=1):
        name = f"model-{number:05d}-of-{num_files:05d}.safetensors"
        save_file(tensors, out / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        total_bytes += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    tokens = {f"{kind}_token_id": shape.config()[f"{kind}_token_id"] for kind in ("bos", "eos")}
    (out / "generation_config.json").write_text(json.dumps(tokens, indent=1))
    (out / "config.json").write_text(json.dumps(shape.config(), indent=1))
    os.sync()  # what is not yet on the disk cannot be dropped from the page cache
    return total_bytes


def _parts(shape: Shape, device: str) -> Iterator[dict[str, Tensor]]:
    """The tensors of each file: the embedding, every layer, the final norm with the head."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*sizes: int) -> Tensor:
        values = torch.randn(*sizes, generator=generator, device=device)
        return (values * 0.02).to(torch.bfloat16).cpu()

    ones = torch.ones(shape.hidden, dtype=torch.bfloat16)
    kv_size = shape.hidden // shape.heads * shape.kv_heads
    yield {"model.embed_tokens.weight": random(shape.vocab, shape.hidden)}
    for layer_idx in range(shape.layers):
        layer = {
            "self_attn.q_proj": random(shape.hidden, shape.hidden),
            "self_attn.k_proj": random(kv_size, shape.hidden),
            "self_attn.v_proj": random(kv_size, shape.hidden),
            "self_attn.o_proj": random(shape.hidden, shape.hidden),
            "mlp.gate_proj": random(shape.intermediate, shape.hidden),
            "mlp.up_proj": random(shape.intermediate, shape.hidden),
            "mlp.down_proj": random(shape.hidden, shape.intermediate),
            "input_layernorm": ones.clone(),
            "post_attention_layernorm": ones.clone(),
        }
        yield {f"model.layers.{layer_idx}.{name}.weight": value for name, value in layer.items()}
    yield {"model.norm.weight": ones, "lm_head.weight": random(shape.vocab, shape.hidden)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a random-weight Llama checkpoint.")
    parser.add_argument("out", type=Path, help="directory to write into")
    sizes = ("hidden", "intermediate", "layers", "heads", "kv_heads", "vocab")
    for name in sizes:
        default = getattr(Shape(), name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    args = parser.parse_args()
    total_bytes = write_checkpoint(args.out, Shape(**{name: getattr(args, name) for name in sizes}))
    print(f"{args.out}: {total_bytes / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
