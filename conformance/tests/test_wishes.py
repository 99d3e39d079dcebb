"""Whatever a request, a call or an opening may ask for has values in the suite: what is new and has
none fails here.
"""

from __future__ import annotations

import inspect
import random
import typing
from dataclasses import fields

import torch
from transformers import LlamaForCausalLM
from transformers.utils import TransformersKwargs

from ollm_conformance import arguments, options, wishes
from ollm_core.generate.arguments import FINE
from ollm_core.generate.causal_lm import StreamedModel
from ollm_core.options import LoadOptions
from ollm_core.serving.request import Choices, Request, SamplingParams, Score, Wanted
from ollm_core.text.generation_config import RUN_FIELDS

VOCABULARY = 256
DRAW = random.Random(0)


def names(kind):
    """Of the fields of a dataclass."""
    return {field.name for field in fields(kind)}


def asked(seed=0):
    """Requests as a check has them."""
    return wishes.requests(VOCABULARY, [torch.arange(5, 205)], random.Random(seed))


def test_every_option_of_a_request_has_values():
    """Of answers, scores and choices, and of the request around them."""
    assert wishes.sampling_values(VOCABULARY, DRAW).keys() == names(SamplingParams)
    assert wishes.request_values().keys() == names(Request) - {"token_ids", "wanted", "request_id"}
    wanted = [request.wanted for request in asked()]
    assert {type(one) for one in wanted} == set(typing.get_args(Wanted))
    assert names(Score) == {"num_tokens", "top"}
    assert names(Choices) == {"token_ids"}


def test_every_rule_of_a_checkpoint_has_values():
    """Those of generation_config.json for the tokens of any answer; where texts end is said by
    other checks.
    """
    ends = {"bos_token_id", "eos_token_id", "pad_token_id", "stop_strings"}
    ruled = wishes.checkpoint_values(VOCABULARY, random.Random(0))
    assert ruled.keys() == {*RUN_FIELDS} - ends


def test_every_value_is_dealt():
    """Each of each field, but stop texts beside a least number of tokens."""
    wanted = [one.wanted for one in asked(3) if isinstance(one.wanted, SamplingParams)]
    values = wishes.sampling_values(VOCABULARY, random.Random(3))
    for name in values.keys() - {"stop", "logits_processors", "min_tokens"}:
        dealt = {repr(getattr(one, name)) for one in wanted}
        assert len(dealt) == len({repr(one) for one in values[name]}), name


def test_every_argument_of_a_call_has_values():
    """Those of transformers' models, and those that core knows."""
    mask = torch.ones(2, 9, dtype=torch.long)
    known = {
        *arguments.argument_values(mask, 8), *arguments.GIVEN_ALWAYS, *arguments.OF_ITS_OWN,
    }  # fmt: skip
    theirs = inspect.signature(LlamaForCausalLM.forward).parameters
    own = inspect.signature(StreamedModel.forward).parameters
    wanted = {*theirs, *own, *FINE, *TransformersKwargs.__annotations__}
    assert wanted - known == {"self", "kwargs", "others"}


def test_every_option_of_load_has_values():
    """As it is varied in runs of configs."""
    values = options.load_values(["device"], chunked=True, drafts=True)
    assert values.keys() == names(LoadOptions)
