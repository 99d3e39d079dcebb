"""A number of rows that stands for fewer takes as much as any of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

import ollm
from ollm_adapter_gpt_oss import GptOssAdapter
from ollm_adapter_llama import LlamaAdapter
from ollm_adapter_qwen3_next import Qwen3NextAdapter
from ollm_conformance.subject import Subject
from ollm_core.attention import blockwise, kernels
from ollm_core.engine.batch import NewTokens
from ollm_core.engine.row_steps import EACH, UNIT, round_rows, row_steps
from ollm_core.products import products, small_batch

LAST_ROWS = [
    1, blockwise._FEW, small_batch.MOST_ROWS, products._FEWEST_ROWS - 1, products._MANY_ROWS,
]  # fmt: skip
"""After each of these numbers another kernel is chosen, or another way to merge."""
ONE = torch.zeros(1, dtype=torch.long)
NUMBERS = 9, 16, 17, 33, 70


@given(st.integers(1, 5000))
def test_steps_lead_from_a_class_to_the_number_itself(num_rows):
    """Each asks about fewer rows than the one before, at most seven times."""
    found = [round_rows(num_rows, step) for step in row_steps(num_rows)]
    assert found[-1] == num_rows
    assert found == sorted(set(found), reverse=True)
    assert len(found) <= 7
    assert found[0] <= max(2 * num_rows, EACH)


@given(st.integers(1, 5000), st.sampled_from([2, 4, 8, 16, 32, 64]))
def test_no_number_is_rounded_past_one_after_which_kernels_change(num_rows, step):
    """Up to 64 queries kernels on a GPU are one block of threads, and so on."""
    rounded = round_rows(num_rows, step)
    ends = [*LAST_ROWS, *range(kernels._SPLIT_ROWS, 6000, kernels._SPLIT_ROWS)]
    assert UNIT % kernels._SPLIT_ROWS == 0
    assert num_rows <= rounded
    assert not any(num_rows <= end < rounded for end in ends)


ADAPTERS = {"llama": LlamaAdapter, "gpt-oss": GptOssAdapter, "qwen3-next": Qwen3NextAdapter}
GPT2 = {"vocab_size": 199, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 1024}


def written(family, dtype, directory):
    """A tiny checkpoint."""
    if family in ADAPTERS:
        return Subject(ADAPTERS[family](), directory).tiny(dtype)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **GPT2))
    model.to(getattr(torch, dtype)).save_pretrained(directory / "model")
    return directory / "model"


@pytest.mark.parametrize(
    ("family", "dtype", "attention"),
    [
        ("llama", "float32", "blockwise"),
        ("llama", "bfloat16", "blockwise"),
        ("llama", "bfloat16", "exact"),
        ("gpt-oss", "bfloat16", "blockwise"),
        ("qwen3-next", "float32", "blockwise"),
        ("gpt2", "bfloat16", "exact"),
    ],
)
@pytest.mark.parametrize("shared", [False, True])
def test_more_rows_take_as_much_as_fewer(tmp_path, ids, family, dtype, attention, shared):
    """Of a step over sequences that share a document, or have one each."""
    directory = written(family, dtype, tmp_path)
    with ollm.load(directory, device="cpu", attention=attention) as model:
        cache, planner = model.new_cache("host"), model.engine._pass_planner
        store = cache.store
        document = store.new_sequence()
        model.engine.run(store, [NewTokens(document, ids(600), 0)])
        rows = [
            store.fork(document) if shared else store.new_sequence() for _ in range(max(NUMBERS))
        ]
        work = [NewTokens(sequence, ONE, store.num_tokens(sequence)) for sequence in rows]
        with torch.no_grad():
            for number in NUMBERS:
                taken = [
                    planner.choose(store, work[:number], step)[0].needed.device
                    for step in row_steps(number)
                ]
                assert taken == sorted(taken, reverse=True)
