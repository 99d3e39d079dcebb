"""How far two runs of one model may be apart that differ in the order of their sums alone."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from ollm_conformance.compare import same_form
from ollm_conformance.seeds import drawn
from ollm_conformance.subject import Reference

_MEAN_TIMES = 2.0
_WORST_TIMES = 4.0
_FLOOR = 2.0**-20
"""Of the scale: eight units in the last place of float32, where a model hardly rounds at all."""
_NUM_MOVED = 8
_MOVED_BY = 2.0**-19
"""Of each weight: 32 units in the last place of float32, four times what rounding adds up to in a
layer, so that a choice between two that rounding may turn is turned in one of so many runs.
"""


def rounded_alike(found: Tensor, expected: Tensor, true: Tensor, what: str) -> None:
    """Raises AssertionError if `found` has more rounding errors than `expected` has.

    Both are logits [T, V] in one dtype, `expected` those of un-offloaded transformers; `true` are
    the same in float64. What a model makes of a rounding error, as sharp attention makes much, it
    makes in both. Errors of `found` may be twice as large in the mean of squares, and four times at
    most.
    """
    same_form(found, expected, what)
    scale = float(true.abs().max())
    errors, own = ((logits.double() - true).abs() for logits in (found, expected))
    for name, times, error, usual in (
        ("mean", _MEAN_TIMES, _mean(errors), _mean(own)),
        ("largest", _WORST_TIMES, float(errors.max()), float(own.max())),
    ):
        most = times * usual + _FLOOR * scale
        if not error <= most:  # NaN is no agreement
            row = int(errors.amax(-1).nan_to_num(float("inf")).argmax())
            raise AssertionError(
                f"{what}: expected a {name} error of at most {most:.3g} against float64, where "
                f"transformers has {usual:.3g}, got {error:.3g} (logits are up to "
                f"{scale:.3g}; the largest error is at token {row})"
            )


def within_rounding(
    found: Tensor,
    expected: Tensor,
    tolerance: float,
    reference: Reference,
    pieces: Sequence[Tensor],
    what: str,
) -> None:
    """Raises AssertionError where logits [T, V] in float32 differ by more than `tolerance` of the
    scale and by more than rounding explains.

    `expected` are those of `reference` for `pieces`. Of many layers each may make more of an error,
    and a router whose scores are nearly equal chooses another expert by it. What rounding can do to
    a token shows in float64, with weights that are moved by some units in the last place of
    float32: as much as it does to the token or to an earlier one.
    """
    same_form(found, expected, what)
    allowed = torch.full((len(expected),), tolerance * float(expected.abs().max())).double()
    errors = (found.double() - expected.double()).abs().amax(-1)
    if bool((errors <= allowed).all()):
        return
    moved = _moved_by_rounding(reference, pieces).cummax(0).values
    wrong = ~(errors <= allowed + moved)  # NaN is no agreement
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise AssertionError(
            f"{what}: token {row}: expected a difference of at most {float(allowed[row]):.3g}, and "
            f"{float(moved[row]):.3g} more by rounding, got {float(errors[row]):.3g}"
        )


def _moved_by_rounding(reference: Reference, pieces: Sequence[Tensor]) -> Tensor:
    """[T]: how far the logits of each token go where weights are moved by some of the last bits
    of float32.
    """
    true = reference.in_float64
    logits, generator = true.run_pieces(pieces), drawn(2)
    found = logits.new_zeros(len(logits))
    for _ in range(_NUM_MOVED):
        model = copy.deepcopy(true.model)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
                parameter.mul_(1 + _MOVED_BY * noise)
        moved = true.with_model(model)
        found = found.maximum((moved.run_pieces(pieces) - logits).abs().amax(-1))
    return found


def _mean(errors: Tensor) -> float:
    return float(errors.square().mean().sqrt())
