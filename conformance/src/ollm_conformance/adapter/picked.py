"""Checks of rows that are picked, moved and repeated, as beam search does with them."""

from __future__ import annotations

import random

import torch

from ollm_conformance.adapter.base import AdapterSuite
from ollm_conformance.checks import check
from ollm_conformance.compare import same_within
from ollm_conformance.seeds import run_seed
from ollm_conformance.subject import Subject
from ollm_core.testing import supports

_ROWS = (2, 3, 4, 5, 7)


class Picked(AdapterSuite):
    """Rows that change places."""

    @check(
        "batches.picked",
        "Whichever rows of a batch are picked, moved and repeated, up to seven, each goes on from "
        "the text of the row that it was.",
        look="caches(): what a row remembers is its own",
        needs=["batch"],
    )
    def test_picked(self, subject: Subject) -> None:
        draw, reference = random.Random(run_seed()), subject.reference()
        tiers = [t for t in ("device", "host", "disk") if supports(subject.adapter, f"kv-{t}")]
        with subject.open() as model:
            for number, num_rows in enumerate(_ROWS):
                texts = [subject.prompt(9, seed=10 * num_rows + row) for row in range(num_rows)]
                cache = model.new_cache(kv=tiers[number % len(tiers)])
                model(input_ids=torch.stack(texts), past_key_values=cache, logits_to_keep=1)
                picked = []
                for turn in range(3):
                    sources = [draw.randrange(num_rows) for _ in range(num_rows)]
                    if turn == 0:  # the last two are copies of one
                        sources[-1] = sources[-2]
                    picked.append(sources)
                    cache.reorder_cache(torch.tensor(sources))
                    new = subject.prompt(num_rows, seed=draw.randrange(1000))
                    texts = [
                        torch.cat([texts[source], new[row : row + 1]])
                        for row, source in enumerate(sources)
                    ]
                    logits = model(input_ids=new[:, None], past_key_values=cache).logits[:, -1]
                for row, text in enumerate(texts):
                    expected = reference.run(text, last_only=True)[0]
                    what = f"logits of row {row} of {num_rows}, picked as {picked}"
                    same_within(logits[row], expected, 1e-3, what)
                cache.close()
