"""What a streamed model inherits: it works, or it says that it is not there."""

from __future__ import annotations

import re
from inspect import isfunction

import pytest
import torch
from transformers import AutoModelForCausalLM, pipeline

import ollm
from ollm_core import UnsupportedError
from ollm_core.generate.causal_lm import StreamedModel
from ollm_core.generate.surface import INHERITED, only_what_works

IDS = torch.tensor([[5, 6, 7, 8]])
SHORT = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
OWN = {
    "can_generate", "device", "dtype", "eval", "forward", "get_experts_implementation",
    "num_parameters", "prepare_inputs_for_generation", "tie_weights", "to", "train",
}  # fmt: skip


def promised():
    """Public functions and properties of the base classes of torch and transformers. Without what
    transformers adds to torch's while it runs.
    """
    for base in StreamedModel.__mro__:
        if base.__module__.startswith(("torch", "transformers")):
            for name, found in vars(base).items():
                kinds = property | classmethod | staticmethod
                added = "<locals>" in getattr(found, "__qualname__", "")
                if name.startswith("_") or added:
                    continue
                if isfunction(found) or isinstance(found, kinds):
                    yield name


def test_all_else_is_refused(model):
    """What is neither on the list nor the model's own raises, in one line."""
    refused = set(promised()) - INHERITED - OWN
    assert refused >= {
        "generate_batch", "init_continuous_batching", "parameters", "named_parameters", "buffers",
        "state_dict", "load_state_dict", "save_pretrained", "push_to_hub", "from_pretrained",
        "resize_token_embeddings", "get_input_embeddings", "half", "float", "cuda", "cpu",
        "gradient_checkpointing_enable", "compile", "add_adapter", "load_adapter",
        "get_memory_footprint", "heal_tokens", "modules", "load_custom_generate", "base_model",
        "dequantize",
    }  # fmt: skip
    for name in refused:
        with pytest.raises(UnsupportedError, match=f"a streamed model has no {re.escape(name)}"):
            getattr(model, name)()
    with pytest.raises(UnsupportedError, match=r"no from_pretrained.*ollm\.load"):
        StreamedModel.from_pretrained("somewhere")


def test_what_is_inherited_works(model, tiny, reference):
    """Each name of the list, against transformers' own answer where that has one."""
    theirs = reference(tiny, torch.float32).model
    options = {"return_dict_in_generate": True, "output_scores": True, **SHORT}
    calls = []

    def scores(one):
        found = one.generate(IDS, **options)
        return one.compute_transition_scores(found.sequences, found.scores)

    def hooked(one, register):
        handle = getattr(one, register)(lambda *_: calls.append(register))
        one(IDS)
        handle.remove()
        return calls.pop()

    answers = {
        "generate": lambda one: one.generate(IDS, **SHORT),
        "compute_transition_scores": scores,
        "loss_function": lambda one: one.loss_function,
        "register_forward_hook": lambda one: hooked(one, "register_forward_hook"),
        "register_forward_pre_hook": lambda one: hooked(one, "register_forward_pre_hook"),
        "extra_repr": lambda one: one.extra_repr(),
        "get_correct_attn_implementation": lambda one: one.get_correct_attn_implementation("eager"),
        "get_correct_experts_implementation": lambda one: one.get_correct_experts_implementation(
            "eager"
        ),
        "is_remote_code": lambda one: one.is_remote_code(),
    }
    assert answers.keys() == INHERITED
    for name, answer in answers.items():
        found, expected = answer(model), answer(theirs)
        if isinstance(expected, torch.Tensor):
            assert torch.allclose(found, expected, atol=1e-4), name
        else:
            assert found == expected, name
    assert repr(model) == "StreamedModel()"


def test_what_a_later_version_adds_is_refused():
    """The list is of what works, not of what does not."""

    def later(self):
        return []

    base = type("Later", (), {"__module__": "transformers.later", "some": later, "fact": "data"})
    base.also = property(later)
    base.made = classmethod(later)

    class Model(base):
        def mine(self):
            return 1

    only_what_works(Model)
    model = Model()
    assert (model.mine(), model.fact) == (1, "data")
    for ask in (lambda: model.some(), lambda: model.also, lambda: Model.made()):
        with pytest.raises(UnsupportedError, match="a streamed model has no"):
            ask()


def test_what_is_so_already_is_fine(model):
    """Callers that prepare any model may do so; nothing else is changed or pretended."""
    assert not model.training
    assert model.eval() is model.train(False) is model
    assert model.tie_weights() is None
    for arguments, options in (
        (("cpu",), {}),
        ((torch.device("cpu"), torch.float32), {"non_blocking": True}),
        ((IDS.float(),), {}),
        ((), {"device": "cpu:0", "dtype": None}),
    ):
        assert model.to(*arguments, **options) is model
    for value in ("meta", torch.float16, IDS):
        with pytest.raises(UnsupportedError, match=r"stays on cpu in float32.*ollm\.load"):
            model.to(value)
    with pytest.raises(UnsupportedError, match="cannot be trained"):
        model.train()


@pytest.mark.filterwarnings("ignore")
def test_a_pipeline_of_transformers(chat):
    """It gives the text that it gives with the model un-offloaded."""
    theirs = AutoModelForCausalLM.from_pretrained(chat, attn_implementation="eager")
    with ollm.load(chat, device="cpu") as model:
        found, expected = (
            pipeline("text-generation", model=one, tokenizer=model.tokenizer)(
                ["5 6 7", "8 9"], max_new_tokens=4, do_sample=False
            )
            for one in (model, theirs)
        )
    assert found == expected


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_counted_as_transformers_does(make_llama, reference, tied):
    """Tied ones once; lm-eval asks for that. None can be trained."""
    path = make_llama(tie_word_embeddings=tied)
    with ollm.load(path, device="cpu") as model:
        assert model.num_parameters() == reference(path, torch.float32).model.num_parameters()
        assert model.num_parameters(only_trainable=True) == 0
        with pytest.raises(UnsupportedError, match="cannot be left out"):
            model.num_parameters(exclude_embeddings=True)
