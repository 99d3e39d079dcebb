"""Which tensors experts are made of: declared by an adapter, checked against file and model."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from mixtures import EXPERTS, FAMILIES, Qwen3Moe, StackedQwen3Moe, open_moe
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ollm_core import CheckpointError, EncodedTensor, ParameterSource, WeightPlan
from ollm_core.checkpoint.safetensors import open_checkpoint
from ollm_core.plugins.loader import Offer
from ollm_core.plugins.registry import Registry


@pytest.mark.parametrize("stacked", [False, True])
def test_encoded_experts(make_moe, ids, stacked):
    """A codec decodes each expert's tensors; a row of a tensor encoded as a whole is refused."""

    def codec(request):
        found = {}
        for name, info in request.tensors.items():
            if name.endswith(".neg"):
                parts = (name,), info.dtype, info.shape, torch.neg
                found[name.removesuffix(".neg")] = EncodedTensor(*parts)
        return found

    directory = make_moe("qwen3_moe")
    with open_moe(directory, chunk_size=64) as model:
        expected = model(input_ids=ids(90)[None]).logits
    tensors = load_file(directory / "model.safetensors")
    if stacked:
        tensors = AutoModelForCausalLM.from_pretrained(directory).state_dict()
    encoded = {f"{n}.neg": -t for n, t in tensors.items() if ".experts." in n}
    plain = {n: t for n, t in tensors.items() if ".experts." not in n}
    save_file(encoded | plain, directory / "model.safetensors")
    adapter = StackedQwen3Moe() if stacked else Qwen3Moe()
    registry = Registry.of(adapter)
    registry._offers["ollm_weight_codecs", "n"] = Offer("ollm_weight_codecs", "n", codec, "test")
    if stacked:
        with pytest.raises(CheckpointError, match="encoded as a whole"):
            open_moe(directory, adapter, registry=registry)
        return
    with open_moe(directory, adapter, registry=registry, chunk_size=64) as model:
        for _ in range(2):
            assert torch.equal(model(input_ids=ids(90)[None]).logits, expected)


@pytest.mark.parametrize("stacked", [False, True])
def test_the_plan_uses_every_tensor_once(make_moe, stacked):
    """As pure data, the plan names each tensor once, or each row of it once, or ignores it."""
    config = FAMILIES["qwen3_moe"][1]
    adapter = StackedQwen3Moe() if stacked else Qwen3Moe()
    tensors = open_checkpoint(make_moe("qwen3_moe")).tensors
    names = set(tensors)
    if stacked:
        names = {n for n in names if ".experts." not in n}
        names |= {f"model.layers.{i}.{leaf}" for i in (0, 2) for leaf in EXPERTS}
    plan = adapter.weights(config.to_dict(), names)
    used = Counter((name, s.row) for s in plan.sources() for name in s.tensors)
    assert set(used.values()) == {1}
    assert {name for name, _ in used} | plan.ignored == names
    rows = {row for name, row in used if "experts." in name}
    assert rows == (set(range(16)) if stacked else {None})
    assert not plan.parameters.keys() & plan.experts.keys()


class Wrong(Qwen3Moe):
    """Declares what the checkpoint and the model do not bear out."""

    def __init__(self, change):
        self.change = change

    def weights(self, config, tensor_names):
        plan = super().weights(config, tensor_names)
        return WeightPlan(plan.parameters, plan.ignored, self.change(dict(plan.experts)))


UP = "model.layers.0.mlp.experts.gate_up_proj"
DOWN = "model.layers.0.mlp.experts.down_proj"
NORM = ParameterSource(("model.norm.weight",), row=64)
WRONG_PLANS = {
    "an expert less": (lambda e: e | {UP: e[UP][1:]}, "15 experts are planned"),
    "none": (lambda e: {k: v for k, v in e.items() if k != UP}, "no checkpoint tensor|0 experts"),
    "another shape": (lambda e: e | {DOWN: e[UP]}, "has shape"),
    "a row too far": (lambda e: e | {DOWN: (NORM, *e[DOWN][1:])}, "needs row 64"),
    "no experts": (lambda e: e | {"model.norm.x": e[UP]}, "model.norm.x, which is no parameter"),
}


@pytest.mark.parametrize("case", WRONG_PLANS)
def test_a_wrong_plan_is_refused(make_moe, ids, case):
    """Experts that are missing, too many or of another shape are named before a pass gives wrong
    logits.
    """
    change, message = WRONG_PLANS[case]
    directory = make_moe("qwen3_moe")

    def run():
        with open_moe(directory, Wrong(change)) as model:
            model(input_ids=ids(64)[None])

    with pytest.raises(CheckpointError, match=message):
        run()
