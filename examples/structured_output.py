"""An answer that follows a JSON schema, by llguidance as a logits processor of `generate`.

Needs `pip install 'ollm-core[structured]'`. python examples/structured_output.py [MODEL]
"""

from __future__ import annotations

import json
import sys

import llguidance.hf
import torch
from transformers import LogitsProcessor

import ollm

SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "sure": {"type": "boolean"}},
    "required": ["city", "sure"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},  # a small model may write blanks for ever
}


class Grammar(LogitsProcessor):
    """Takes every token away that would leave the schema."""

    def __init__(self, tokenizer, num_prompt_tokens: int) -> None:
        known = llguidance.hf.from_tokenizer(tokenizer)
        grammar = llguidance.LLMatcher.grammar_from_json_schema(SCHEMA)
        self.matcher = llguidance.LLMatcher(known, grammar)
        self.seen = num_prompt_tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Logits [1, V] after the tokens [1, T]."""
        self.matcher.consume_tokens(input_ids[0, self.seen :].tolist())
        self.seen = input_ids.shape[1]
        allowed = torch.frombuffer(bytearray(self.matcher.compute_logit_bias()), dtype=torch.uint8)
        return scores.masked_fill(allowed[: scores.shape[1]] == 0, -torch.inf)


path = sys.argv[1] if len(sys.argv) > 1 else "models/smollm2-135M"
with ollm.load(path, device="cpu") as model:
    question = [{"role": "user", "content": "What is the capital of France? Answer in JSON."}]
    prompt = model.tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    ids = model.generate(
        prompt,
        logits_processor=[Grammar(model.tokenizer, prompt.shape[1])],
        max_new_tokens=60,
        do_sample=False,
    )
    text = model.tokenizer.decode(ids[0, prompt.shape[1] :], skip_special_tokens=True)
    print(json.loads(text))
