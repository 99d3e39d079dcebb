"""How far two runs of one model may be apart that differ in the order of their sums alone."""

from __future__ import annotations

from torch import Tensor

from ollm_conformance.compare import same_form

_MEAN_TIMES = 2.0
_WORST_TIMES = 4.0
_FLOOR = 2.0**-20
"""Of the scale: eight units in the last place of float32, where a model hardly rounds at all."""


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


def _mean(errors: Tensor) -> float:
    return float(errors.square().mean().sqrt())
