"""What a run computes by default: the same weights, with no more rounding than transformers."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from ollm_conformance.adapter.base import AdapterSuite
from ollm_conformance.checks import check
from ollm_conformance.compare import same_form
from ollm_conformance.subject import PROMPT, Subject, run_pieces
from ollm_core.testing import without_instructions

_TIMES = 1.1  # of transformers' own error; two ways of rounding differ by a few percent
_FLOOR = 2.0**-20
"""Of the largest logit: what float32 itself leaves."""


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


def _error(logits: Tensor, true: Tensor) -> float:
    """Of the token in the middle: a router's other choice changes some tokens by much, in any run
    in half precision.
    """
    errors = (logits.double() - true).square().mean(-1).sqrt()
    return float(torch.quantile(errors, 0.5))
