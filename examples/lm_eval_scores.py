"""EleutherAI's lm-eval on a task of its own: the model object, the server, and plain transformers.

All three give the same log-likelihoods. Nothing is fetched: the task is below.
Needs `pip install 'ollm-core[serve]' 'lm_eval[api]'`. python examples/lm_eval_scores.py [MODEL]
"""

from __future__ import annotations

import sys

import torch
from datasets import Dataset
from lm_eval import simple_evaluate
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.models.openai_completions import LocalCompletionsAPI
from served import served
from transformers import AutoModelForCausalLM

import ollm

ROWS = [
    {"country": "France", "choices": ["Paris", "Rome", "Berlin"], "label": 0},
    {"country": "Italy", "choices": ["Madrid", "Rome", "Vienna"], "label": 1},
    {"country": "Spain", "choices": ["Oslo", "Lisbon", "Madrid"], "label": 2},
]


def scores(model) -> list[float]:
    """The log-likelihood of each choice of each row, as lm-eval has it from `model`."""
    task = ConfigurableTask(
        config={
            "task": "capitals",
            "custom_dataset": lambda **_: {"test": Dataset.from_list(ROWS)},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "The capital of {{country}} is",
            "doc_to_choice": "choices",
            "doc_to_target": "label",
        }
    )
    found = simple_evaluate(model=model, tasks=[task], bootstrap_iters=0, verbosity="ERROR")
    print(found["results"]["capitals"]["acc,none"], "right of 1", file=sys.stderr)
    samples = sorted(found["samples"]["capitals"], key=lambda one: one["doc_id"])
    return [float(logprob) for one in samples for [[logprob, _]] in one["resps"]]


path = sys.argv[1] if len(sys.argv) > 1 else "models/smollm2-135M"
plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, trust_remote_code=False)
with ollm.load(path, device="cpu", dtype="float32") as model:
    tokenizer = model.tokenizer
    streamed = scores(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4))
expected = scores(HFLM(pretrained=plain, tokenizer=tokenizer, batch_size=4, device="cpu"))
with served(path, "--dtype", "float32") as address:
    through_server = scores(
        LocalCompletionsAPI(
            base_url=f"{address}/v1/completions",
            model="any",
            tokenizer_backend="huggingface",
            tokenizer=path,
            num_concurrent=4,
        )
    )
for name, found in (("model object", streamed), ("server", through_server)):
    apart = max(abs(one - other) for one, other in zip(found, expected, strict=True))
    print(f"{name}: {len(found)} log-likelihoods, at most {apart:.1e} from transformers'")
    assert apart < 1e-3, (found, expected)
