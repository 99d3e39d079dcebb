"""Random walks: what may be done to a model, in any order, against transformers."""

from __future__ import annotations

from ollm_conformance.adapter.base import AdapterSuite
from ollm_conformance.checks import check
from ollm_conformance.subject import Subject
from ollm_conformance.walk.damage import damage_anywhere
from ollm_conformance.walk.run import ROWS, SEQUENCES, walk

_LOOK = "the steps that the message lists: they are the fewest that were found to show it"


class Walks(AdapterSuite):
    """What nobody thought of: any order of passes, cuts, copies, texts and failures."""

    @check(
        "walk.rows",
        "Whatever follows one another - passes over padded rows, copies and cuts of them, texts "
        "that end in any way, drafts, losses, broken-off passes, closing and coming back - tokens, "
        "logits, lengths, counters and memory accounts are as transformers and the steps have it.",
        look=_LOOK,
    )
    def test_walk_rows(self, subject: Subject) -> None:
        walk(subject, ROWS, _num_steps(subject, 72), self.shrinking_seconds)

    @check(
        "walk.sequences",
        "Sequences that begin, go on alone or together, draft, part and go in any order each have "
        "the logits of their own text.",
        look=_LOOK,
    )
    def test_walk_sequences(self, subject: Subject) -> None:
        walk(subject, SEQUENCES, _num_steps(subject, 48), self.shrinking_seconds)

    @check(
        "walk.damage",
        "Whatever bytes of KV on disk are damaged, a prompt is answered as without them or refused "
        "in one line.",
        look="core: checksums of blocks, states and their index; caches(): kinds of the layers",
        needs=["kv-disk"],
    )
    def test_walk_damage(self, subject: Subject) -> None:
        damage_anywhere(subject, num_places=8)


def _num_steps(subject: Subject, most: int) -> int:
    """Fewer where a pass of the tiny model takes longer."""
    states = any(kind.states for kind in subject.adapter.caches(subject.config))
    slow = states or subject.adapter.layout(subject.config).experts
    return 2 * most // 5 if slow else most
