"""What peers need beside a checkpoint of `make_checkpoint.py`: the same weights as GGUF, for
llama.cpp, and a tokenizer, which others will not open a model without.

Nothing here loads more than one tensor at a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from benchmarks.tools.make_checkpoint import Shape, write_checkpoint

_NAMES = {
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
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def prepare(checkpoint: Path, say: Callable[[str], None]) -> None:
    """Write the random Llama of 2.57 GB to `checkpoint` if it is not there, and what peers need
    beside it. A tokenizer that is there stays.
    """
    if not (checkpoint / "config.json").exists():
        say(f"writing {checkpoint}, 2.57 GB")
        write_checkpoint(checkpoint, Shape())
    (checkpoint / "peers").mkdir(exist_ok=True)
    if not (checkpoint / "tokenizer.json").exists():
        write_tokenizer(checkpoint)


def write_tokenizer(checkpoint: Path) -> None:
    """A tokenizer that every transformers can load: a word for each token id, `w7` for 7."""
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    size = json.loads((checkpoint / "config.json").read_text())["vocab_size"]
    words = [*special.values(), *(f"w{token_id}" for token_id in range(len(special), size))]
    vocabulary = {word: token_id for token_id, word in enumerate(words)}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"}
    split = {"type": "WhitespaceSplit"}
    tokenizer = {"version": "1.0", "added_tokens": [], "pre_tokenizer": split, "model": model}
    (checkpoint / "tokenizer.json").write_text(json.dumps(tokenizer))
    told = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(told, indent=1))


def write_gguf(checkpoint: Path, out: Path) -> None:
    """Write the bfloat16 Llama in `checkpoint` to `out` in bfloat16, norms in float32 as llama.cpp
    has them, without a vocabulary. A file that was not finished is not left under that name.
    """
    config = json.loads((checkpoint / "config.json").read_text())
    unfinished = out.with_suffix(".unfinished")
    writer = gguf.GGUFWriter(str(unfinished), "llama")
    _describe(writer, config)
    for name, tensor in _tensors(checkpoint):
        shape = list(tensor.shape)
        if tensor.dim() == 1:
            writer.add_tensor_info(name, shape, np.dtype(np.float32), 4 * tensor.numel())
            continue
        in_bytes = [*shape[:-1], 2 * shape[-1]]  # the writer wants the shape of what is given
        kind = gguf.GGMLQuantizationType.BF16
        writer.add_tensor_info(name, in_bytes, np.dtype(np.uint8), tensor.nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for name, tensor in _tensors(checkpoint):
        number = heads.get(name.split(".")[-2])
        data = _interleaved(tensor, number) if number else tensor
        if data.dim() == 1:
            writer.write_tensor_data(data.float().numpy())
        else:
            writer.write_tensor_data(data.contiguous().view(torch.uint8).numpy())
    writer.close()
    unfinished.rename(out)


def _describe(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("no_vocab")


def _tensors(checkpoint: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor by its name in GGUF, in the order of the files."""
    for path in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (no dict)
                yield _gguf_name(name.removesuffix(".weight")), file.get_tensor(name)


def _gguf_name(name: str) -> str:
    if name in _NAMES:
        return f"{_NAMES[name]}.weight"
    _, _, layer_idx, rest = name.split(".", 3)
    return f"blk.{layer_idx}.{_NAMES[rest]}.weight"


def _interleaved(weight: Tensor, num_heads: int) -> Tensor:
    """Rows of each head [D, C] from two halves to pairs, as llama.cpp's rotary wants them."""
    rows, columns = weight.shape
    halves = weight.view(num_heads, 2, rows // num_heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)
