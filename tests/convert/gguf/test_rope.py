"""Rope parameters are found again in the divisors of a GGUF file: the logits of the original."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from gguf_files import write_gguf
from transformers import LlamaForCausalLM

import ollm
from ollm_core.convert.gguf.importer import import_gguf

pytest.importorskip("gguf")
pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries that do the reading

BASE = 10000.0
LLAMA3 = {"rope_type": "llama3", "rope_theta": BASE}


def llama3(factor, low, high, positions):
    """Rope parameters as those of Llama 3.1."""
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    return LLAMA3 | dict(zip(names, (factor, low, high, positions), strict=True))


PUBLISHED = llama3(32.0, 1.0, 4.0, 8192)
ROPES = {
    # parameters, what differs in the file, whether the same parameters must be found
    "none": ({"rope_type": "default", "rope_theta": BASE}, {}, True),
    "other base": ({"rope_type": "default", "rope_theta": 500000.0}, {}, True),
    "llama 3.2": (PUBLISHED | {"rope_theta": 500000.0}, {}, True),
    "as llama 3.1": (llama3(8.0, 1.0, 4.0, 64), {}, True),
    "odd ones": (llama3(5.5, 1.5, 3.75, 96), {}, False),
    "linear, as divisors": ({"rope_type": "linear", "factor": 4.0, "rope_theta": BASE}, {}, True),
    "linear, by keys": (
        {"rope_type": "linear", "factor": 4.0, "rope_theta": BASE},
        {
            "keys": {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
            "tensors": {"rope_freqs.weight": None},
        },
        True,
    ),
    "divisors of one": (
        {"rope_type": "default", "rope_theta": BASE},
        {"tensors": {"rope_freqs.weight": np.ones(16)}},
        True,
    ),
}


@pytest.mark.parametrize("case", ROPES)
def test_logits_of_the_original(make_llama, reference, ids, tmp_path, case):
    """An imported model gives the logits of the one that the file was made of, to the bit where its
    rope parameters have been found again.
    """
    parameters, changes, exact = ROPES[case]
    original = make_llama(head_dim=32, rope_parameters=parameters, rope_theta=None)
    model = LlamaForCausalLM.from_pretrained(original)
    out = tmp_path / "out"
    import_gguf(write_gguf(tmp_path / "x.gguf", model, **changes), out, "float32")
    found = json.loads((out / "config.json").read_text())["rope_parameters"]
    if exact:
        assert found == parameters
    prompt = ids(300)
    expected = reference(original, torch.float32).run(prompt, 64)
    with ollm.load(out, device="cpu", chunk_size=64, attention="exact") as opened:
        logits = opened(input_ids=prompt[None]).logits[0]
    assert torch.equal(logits, expected) if exact else torch.allclose(logits, expected, atol=1e-3)
