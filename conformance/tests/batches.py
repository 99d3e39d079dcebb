"""Mutants that one run of pytest tries."""

from __future__ import annotations

from itertools import groupby

_MOST = 8


def batches_of(broken):
    """Lists of a few of them, which are meant for the checks of one group."""
    found = []
    for _, group in groupby(sorted(broken, key=_group), key=_group):
        whole = list(group)
        found += [whole[begin : begin + _MOST] for begin in range(0, len(whole), _MOST)]
    return found


def told(batch):
    """The name of a test of them."""
    first, last = batch[0].name, batch[-1].name
    return f"{_group(batch[0])}:{first}" + ("" if first == last else f"..{last}")


def _group(one):
    return one.check.partition(".")[0]
