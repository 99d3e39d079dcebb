"""The seed of a run: what is random in the suite is drawn from it, so that a run can be repeated,
and another one looks at other numbers.
"""

from __future__ import annotations

import torch

_RUNS = [0]
"""Seeds of the runs of pytest that go on, the innermost last: one may be inside another, as in
tests of the suite. Not a context variable, which threads would not see.
"""
_STRIDE = 1_000_003  # further apart than the numbers of what one run draws


def begin(seed: int) -> None:
    """From here on a run of pytest has this seed, until `end`."""
    _RUNS.append(seed)


def end() -> None:
    """The innermost run is over."""
    _RUNS.pop()


def run_seed() -> int:
    """That of the run of pytest which goes on."""
    return _RUNS[-1]


def drawn(number: int) -> torch.Generator:
    """What draws the random numbers of the thing that has this `number`; others draw others."""
    return torch.Generator().manual_seed(number + _STRIDE * run_seed())
