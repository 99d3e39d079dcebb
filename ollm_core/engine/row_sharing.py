"""What of the stored blocks the rows of a call share, as far as that decides what it takes."""

from __future__ import annotations

from collections.abc import Sequence

from ollm_core.contracts.kv import KVGeometry, KVStore, SharedRun
from ollm_core.device.buffers import round_up
from ollm_core.engine.batch import NewTokens
from ollm_core.engine.traced_cache import APART, Sharing
from ollm_core.model.skeleton import Skeleton


class RowSharing:
    """Looks at the sequences of a store, for one model."""

    def __init__(self, skeleton: Skeleton, geometry: KVGeometry) -> None:
        self._skeleton = skeleton
        self._geometry = geometry

    @property
    def packs(self) -> bool:
        """Whether rows of a call may be packed: all that layers remember are keys and values."""
        return self._skeleton.own is None and not self._skeleton.recurrent

    def runs(self, store: KVStore, work: Sequence[NewTokens]) -> Sequence[SharedRun]:
        """What the sequences of `work` share in the first layer that keeps all tokens."""
        full = [i for i, kind in enumerate(self._geometry.kinds) if kind.kind == "full"]
        sequences, starts = [item.sequence for item in work], [item.start for item in work]
        return store.shared_runs(full[0], sequences, starts) if full else ()

    def of(
        self, store: KVStore, work: Sequence[NewTokens], lengths: tuple[int, ...] = ()
    ) -> Sharing | None:
        """How the sequences of `work` share what they have; `lengths` are those of packed ones.
        None if layers differ, as they may where an error has left some cut and others not.
        """
        if len(work) < 2 or self._skeleton.own is not None:
            return APART
        sequences, starts = [item.sequence for item in work], [item.start for item in work]
        told = {
            tuple(store.shared_runs(layer_idx, sequences, starts))
            for layer_idx, kind in enumerate(self._geometry.kinds)
            if kind.kind == "full"
        }
        if len(told) > 1:
            return None
        runs = next(iter(told), ())
        if not runs:
            return APART
        ends = {row: run.end for run in runs for row in run.rows}
        num_own = max(start - ends.get(row, 0) for row, start in enumerate(starts))
        num_own = round_up(num_own, self._geometry.block_size)
        if lengths:
            return Sharing(tuple(run.rows for run in runs), lengths, num_own)
        sizes = len(ends), *sorted({len(run.rows) for run in runs})
        return Sharing(tuple(tuple(range(size)) for size in sizes), (), num_own)
