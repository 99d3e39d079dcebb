"""What rounding does is no fault, in a model that makes much of it; what is more, is one."""

from __future__ import annotations

import pytest
import torch
from power import results

from ollm_adapter_gpt_oss import GptOssAdapter
from ollm_conformance import AdapterConformance, seeds
from ollm_conformance.compare import same_within
from ollm_conformance.rounding import within_rounding
from ollm_conformance.subject import Reference, Subject
from ollm_core.attention.blockwise import BlockwiseAttention

_TOLERANCE = 1e-3
_CHUNK = 64
_WIDE = {
    "num_hidden_layers": 11, "hidden_size": 256, "num_attention_heads": 8,
    "num_key_value_heads": 1, "head_dim": 24, "num_local_experts": 11, "num_experts_per_tok": 2,
    "experts_per_token": 2, "intermediate_size": 64, "vocab_size": 256, "sliding_window": 20,
    "layer_types": ["sliding_attention", "full_attention"] * 5 + ["sliding_attention"],
}  # fmt: skip


def sharp(directory):
    """A model of many layers with sharp attention: an error of 1e-5 in the first is 0.1 in the
    last, and a router's choice turns on it.
    """
    reference = Reference(directory, torch.float32, chunk_size=_CHUNK)
    with torch.no_grad():
        for parameter in reference.model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2)
    return reference


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A model, the pieces of a text, and its logits."""
    seeds.begin(10)
    try:
        subject = Subject(GptOssAdapter(), tmp_path_factory.mktemp("wide"))
        directory = subject.checkpoint({**subject.config, **_WIDE})
        pieces = subject.prompt(60, vocab_size=256).split([50, 1, 8, 1])
    finally:
        seeds.end()
    reference = sharp(directory)
    return directory, reference, pieces, reference.run_pieces(pieces)


def test_what_rounding_does_is_no_fault(wide):
    """Logits that float64 rounds to are farther away than the tolerance, and no fault."""
    _, reference, pieces, expected = wide
    rounded = reference.in_float64.run_pieces(pieces).float()
    with pytest.raises(AssertionError):
        same_within(rounded, expected, _TOLERANCE, "logits")
    within_rounding(rounded, expected, _TOLERANCE, reference, pieces, "logits")


@pytest.mark.parametrize("fault", ["window", "sink", "nan", "first"])
def test_what_rounding_does_not_do_is_a_fault(wide, fault):
    """A window that is one token short, a sink that is left out, NaN; and an error of the first
    token, of which rounding makes nothing yet.
    """
    directory, reference, pieces, expected = wide
    if fault in ("nan", "first"):
        found = expected.clone()
        found[0 if fault == "first" else -1, 3] = 0.1 if fault == "first" else float("nan")
    else:
        broken = sharp(directory)
        for layer in broken.model.model.layers:
            if fault == "sink":
                layer.self_attn.sinks.data.fill_(-1e4)
        if fault == "window":
            broken.model.config.sliding_window -= 1
        found = broken.run_pieces(pieces)
    with pytest.raises(AssertionError, match="more by rounding"):
        within_rounding(found, expected, _TOLERANCE, reference, pieces, "logits")


class Wide(AdapterConformance):
    """Seed 10 deals a config of 11 layers that are 256 wide."""

    adapter = GptOssAdapter


def test_many_wide_layers_are_no_alarm():
    """With weights as large as those of a narrow model, block-wise attention chose another expert
    there, as float64 did.
    """
    assert {one.outcome for one in _drawn()} == {"passed"}


def test_a_fault_shows_in_such_a_model(monkeypatch):
    """Block-wise attention without sinks differs by more than rounding makes of any error."""
    attend = BlockwiseAttention.__call__

    def without_sinks(self, *args, s_aux=None, **options):
        deep = args[0].config.num_hidden_layers > 8
        return attend(self, *args, s_aux=None if deep else s_aux, **options)

    monkeypatch.setattr(BlockwiseAttention, "__call__", without_sinks)
    monkeypatch.setattr(Wide, "shrinking_seconds", 0)
    assert {one.outcome for one in _drawn()} == {"failed"}


def _drawn():
    return results(Wide, ["configs.drawn"], ["--ollm-seed=10"])
