"""A tiny model that says what it is told to: each token leads to the next of a chain."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CALLS = (
    "{%- for t in tools or [] %}[tool]{{ t | tojson }}{% endfor %}"
    "{%- for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{%- for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>"
    "{%- endfor %}{% endfor %}[assistant]"
)
"""A chat template that takes functions."""


def make_calling(directory: Path, answer: list[str], template: str = CALLS) -> Path:
    """A model that answers with these tokens whatever is asked. They must differ; those that begin
    with < are control tokens.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    chain = [token for token in answer if not token.startswith("<")]
    spelled = [_spelled(token) for token in chain]
    names = ["<s>", "</s>", *letters, *spelled]
    tokenizer = Tokenizer(models.BPE({name: number for number, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(one, special=True) for one in ("<s>", "</s>")])
    control = [token for token in answer if token.startswith("<")]
    tokenizer.add_tokens([AddedToken(one, special=True, normalized=False) for one in control])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=template
    ).save_pretrained(directory)
    ids = [tokenizer.token_to_id("]")]
    ids += [tokenizer.token_to_id(one if one in control else _spelled(one)) for one in answer]
    _save(directory, tokenizer.get_vocab_size(), [*ids, 1])
    return directory


def _spelled(text: str) -> str:
    return "".join(piece for piece, _ in pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    ).pre_tokenize_str(text))  # fmt: skip


def _save(directory: Path, num_tokens: int, chain: list[int]) -> None:
    size = -(-num_tokens // 16) * 16
    config = LlamaConfig(
        vocab_size=num_tokens, hidden_size=size, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=1, head_dim=8, max_position_embeddings=2048,
        bos_token_id=0, eos_token_id=1, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(num_tokens, size))
        model.lm_head.weight.zero_()
        for before, after in pairwise(chain):
            model.lm_head.weight[after, before] = 1.0
    model.save_pretrained(directory)
