"""Arguments of transformers' models: what changes nothing is taken, anything else is refused."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest
import torch
import transformers
from transformers.utils.generic import TransformersKwargs

from ollm_core import InputError, UnsupportedError
from ollm_core.generate.arguments import FINE
from ollm_core.generate.causal_lm import StreamedModel

CAUSAL_MODEL = re.compile(r"^class \w+ForCausalLM\b.*?(?=^\S|\Z)", re.DOTALL | re.MULTILINE)
"""A class at the top of a module: parsing whole modules takes seconds."""
IDS = torch.tensor([[0, 0, 7, 8, 9], [5, 6, 7, 8, 9]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
SAME = {
    "position_ids": [torch.tensor([[9, 9, 0, 1, 2], [0, 1, 2, 3, 4]])],
    "cache_position": [torch.arange(5)],
    "token_type_ids": [torch.zeros(2, 5)],
    "is_causal": [True],
    "output_attentions": [False],
    "output_hidden_states": [False],
    "output_router_logits": [False],
}
OTHER = {
    "position_ids": [torch.arange(5)[None], torch.arange(5), torch.zeros(3, 2, 5), [0, 1, 2, 3, 4]],
    "cache_position": [torch.arange(1, 6), torch.arange(4)],
    "token_type_ids": [MASK],
    "is_causal": [False],
}


def test_one_rule_for_all(model):
    """Values that say what happens anyway change no bit; others are refused by name."""
    expected = model(IDS, MASK).logits
    for name in FINE:
        for value in (None, *SAME.get(name, [])):
            assert torch.equal(model(IDS, MASK, **{name: value}).logits, expected), name
        for value in OTHER.get(name, [torch.ones(2, 5)]):
            with pytest.raises(UnsupportedError, match=f"no other {name}"):
                model(IDS, MASK, **{name: value})
    with pytest.raises(InputError, match="forward: no argument 'atention_mask'"):
        model(IDS, atention_mask=MASK)


def test_positions_after_a_cache(model):
    """They go on from the row's own tokens, those of the cache from its columns."""
    cache = model.new_cache()
    model(IDS, MASK, past_key_values=cache)
    more = {"position_ids": torch.tensor([[3], [5]]), "cache_position": torch.tensor([5])}
    mask = torch.cat([MASK, MASK[:, :1] * 0 + 1], dim=1)
    model(IDS[:, :1], mask, past_key_values=cache, **more)
    with pytest.raises(UnsupportedError, match="position_ids"):
        model(IDS[:, :1], past_key_values=cache, position_ids=torch.tensor([[5], [5]]))


def test_generate_hands_positions_on(model):
    """Those that follow are taken at each step."""
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    expected = model.generate(IDS, attention_mask=MASK, **options)
    found = model.generate(
        IDS, attention_mask=MASK, position_ids=(MASK.cumsum(1) - 1).clamp(0), **options
    )
    assert torch.equal(found, expected)


def test_a_tuple_for_return_dict(model):
    """As transformers gives it: what is None is left out."""
    expected = model(IDS, MASK).logits
    (logits,) = model(IDS, MASK, return_dict=False)
    assert torch.equal(logits, expected)
    loss, logits, cache = model(IDS[1:], labels=IDS[1:], use_cache=True, return_dict=False)
    assert loss.ndim == 0
    assert cache.get_seq_length() == logits.shape[1] == 5
    model.config.return_dict = False
    assert isinstance(model(IDS, MASK), tuple)


def test_every_argument_of_causal_models_has_its_rule():
    """All that `forward` of ten or more of transformers' causal models takes is known by name."""
    counts: dict[str, int] = {}
    for path in Path(transformers.__file__).parent.glob("models/*/modeling_*.py"):
        for found in CAUSAL_MODEL.finditer(path.read_text()):
            (node,) = ast.parse(found[0]).body
            assert isinstance(node, ast.ClassDef)
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and method.name == "forward":
                    for argument in (*method.args.args[1:], *method.args.kwonlyargs):
                        counts[argument.arg] = counts.get(argument.arg, 0) + 1
    common = {name for name, number in counts.items() if number >= 10}
    assert len(common) > 10
    honoured = set(inspect.signature(StreamedModel.forward).parameters)
    assert common | TransformersKwargs.__optional_keys__ <= honoured | FINE.keys()
