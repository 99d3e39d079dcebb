"""What a run computes by default: the same weights, with no more rounding than transformers."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from ollm_conformance.adapter.base import AdapterSuite
from ollm_conformance.checks import check, does_not_apply
from ollm_conformance.compare import same_form
from ollm_conformance.subject import PROMPT, Subject, run_pieces
from ollm_core.testing import AttendedToken, attended_tokens, without_instructions

_TIMES = 1.1  # of transformers' own error; two ways of rounding differ by a few percent
_FLOOR = 2.0**-20
"""Of the largest logit: what float32 itself leaves."""
_ROUNDINGS = 0.6
"""Of the dtype's epsilon, in the mean of squares: rounding a result is 0.29 at most, and weights
that a processor multiplies in half precision add as much.
"""


class Precision(AdapterSuite):
    """`precision="fast"`: sums in float32, attention block by block where the family has it."""

    @check(
        "precision.fast",
        "By default the logits of a prompt, of steps and of drafts are as near to the model in "
        "float64 as those of transformers in the checkpoint's dtype, whatever the processor's "
        "instructions are.",
        look="layers that multiply otherwise than by torch.nn.functional.linear or matmul; "
        "attention options that the family's modules pass",
    )
    @pytest.mark.parametrize(
        ("dtype", "bare"), [("bfloat16", False), ("bfloat16", True), ("float16", True)]
    )
    def test_fast(self, subject: Subject, dtype: str, bare: bool) -> None:
        reference, prompt = subject.reference(dtype), subject.prompt(PROMPT)
        pieces = prompt.split([PROMPT - 20, 1, 1, 8, 10])
        with (
            without_instructions() if bare else nullcontext(),
            subject.open(subject.tiny(dtype), attention="auto") as model,
        ):
            found = run_pieces(model, pieces)
        expected = reference.run_pieces(pieces)
        true = reference.in_float64.run(prompt)
        what = f"logits in {dtype}, on a processor {'without' if bare else 'with'} instructions"
        same_form(found, expected, what)
        error, own = (_error(logits, true) for logits in (found, expected))
        most = _TIMES * own + _FLOOR * float(true.abs().max())
        assert error <= most, (  # NaN is no agreement
            f"{what} for it: expected a median error of at most {most:.3g} against float64, where "
            f"transformers has {own:.3g}, got {error:.3g}"
        )

    @check(
        "precision.sums",
        "In half precision what block-wise attention gives a layer is the exact result of what it "
        "was given, rounded: its weights and sums are float32's, over any number of blocks.",
        look="attention options that the family's modules pass: windows, sinks, scaling, soft caps",
        needs=["blockwise-attention", "chunked-prefill"],
    )
    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_sums(self, subject: Subject, dtype: str) -> None:
        pieces = subject.prompt(PROMPT + 9).split([PROMPT, 1, 8])
        with (
            subject.open(subject.tiny(dtype), attention="blockwise") as model,
            attended_tokens(model) as tokens,
        ):
            run_pieces(model, pieces)
            epsilon = torch.finfo(model.dtype).eps
        if not tokens:
            does_not_apply("its layers are run by its own forward")
        for token in tokens:
            true = _attended(token)
            size, error = (_size(one) for one in (true, token.output.double() - true))
            assert error <= _ROUNDINGS * epsilon * size, (
                f"layer {token.layer_idx} in {dtype}, a token that sees {token.keys.shape[1]} "
                f"keys: expected attention with an error of at most {_ROUNDINGS} roundings, got "
                f"{error / (epsilon * size):.3g}"
            )


def _attended(token: AttendedToken) -> Tensor:
    """The output of attention in float64, [H, D]."""
    keys, values, options = token.keys.double(), token.values.double(), token.options
    if (window := options.get("sliding_window")) is not None:
        keys, values = keys[:, -window:], values[:, -window:]
    query = token.query.double().unflatten(0, (len(keys), -1))  # [G, H / G, D]
    scores = query @ keys.transpose(1, 2) * options["scaling"]
    if (cap := options.get("softcap")) is not None:
        scores = (scores / cap).tanh() * cap
    if (sinks := options.get("s_aux")) is not None:
        scores = torch.cat([scores, sinks.detach().double().view(*query.shape[:2], 1)], -1)
    weights = scores.softmax(-1)[..., : keys.shape[1]]
    attended: Tensor = weights @ values
    return attended.flatten(0, 1)


def _size(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


def _error(logits: Tensor, true: Tensor) -> float:
    """Of the token in the middle: a router's other choice changes some tokens by much, in any run
    in half precision.
    """
    errors = (logits.double() - true).square().mean(-1).sqrt()
    return float(torch.quantile(errors, 0.5))
