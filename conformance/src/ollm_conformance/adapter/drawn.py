"""Checks of configs and runs that nobody chose: all that may differ is dealt at random."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from ollm_conformance.adapter.base import AdapterSuite
from ollm_conformance.adapter.stored import same_forms
from ollm_conformance.alike import same_parameters
from ollm_conformance.checks import check
from ollm_conformance.compare import same_bits
from ollm_conformance.draws import Dealt, deal, only_sizes
from ollm_conformance.kinds import same_kinds
from ollm_conformance.models import DTYPES, random_model
from ollm_conformance.naming import kept_names
from ollm_conformance.options import OF_THE_SUITE, load_values
from ollm_conformance.rounding import within_rounding
from ollm_conformance.seeds import run_seed
from ollm_conformance.subject import Reference, Subject, run_pieces
from ollm_core import UnsupportedError
from ollm_core.testing import STORED_DTYPES, described_tensors, supports

_NUM_ALL, _NUM_FEW = 5, 3
_NUM_ALL_SLOW, _NUM_FEW_SLOW = 3, 2
"""Of families with experts or states, whose runs take longer."""
_FEW = 9
"""Tokens that show whether transformers runs a model at all."""
_BLOCKWISE = 1e-3
"""Of the scale, in float32: what is wrong differs by far more. So may rounding, where a model makes
much of it: see `within_rounding`.
"""


@dataclass(frozen=True, slots=True)
class Run:
    """How a model is run: options of `load`, and the tokens of each pass."""

    dtype: str
    lengths: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        told = [f"{key} = {value}" for key, value in sorted(self.options.items())]
        return ", ".join([self.dtype, *told, f"passes of {[*self.lengths]} tokens"])


class Drawn(AdapterSuite):
    """Any config of the family, run in any way."""

    @check(
        "configs.drawn",
        "Whatever flags, sizes, ratios, lists and keys left out a config of the family has, many "
        "others than the tiny one's at a time, caches, parameters, stored tensors and the logits "
        "of a run with any options of `load` in any passes are transformers'.",
        look="what goes by the config: layer_parameters(), source(), caches(), layer_types(), "
        "text_config(); the message names the fewest changes that were found to show it",
    )
    def test_drawn(self, subject: Subject) -> None:
        draw = random.Random(run_seed())
        states = any(kind.states for kind in subject.adapter.caches(subject.config))
        slow = states or subject.adapter.layout(subject.config).experts
        num_all, num_few = (_NUM_ALL_SLOW, _NUM_FEW_SLOW) if slow else (_NUM_ALL, _NUM_FEW)
        runs = _runs(subject, draw, num_all + num_few + 1)
        ran = 0
        for dealt, run in zip(deal(subject.config, draw, num_all, num_few), runs, strict=True):
            dealt = _possible(subject, dealt)
            try:
                ran += _same(subject, dealt, run)
            except AssertionError as error:
                until = time.monotonic() + self.shrinking_seconds
                dealt, error = _shrunk(subject, dealt, run, error, until)
                raise AssertionError(
                    f"seed {run_seed()}: tiny_config() with {dealt or 'nothing changed'}; run in "
                    f"{run}: {error}"
                ) from error
        assert ran, "expected some config near tiny_config() that transformers runs, got none"


def _runs(subject: Subject, draw: random.Random, num: int) -> Iterator[Run]:
    """Each value of each option of `load` in some of them."""
    tiers = [tier for tier in ("device", "host", "disk") if supports(subject.adapter, f"kv-{tier}")]
    chunked = supports(subject.adapter, "chunked-prefill")
    drafts = supports(subject.adapter, "drafts") and supports(subject.adapter, "truncate")
    values = load_values(tiers, chunked=chunked, drafts=drafts)
    decks = {
        name: _shuffled(draw, num, values[name]) for name in sorted(values.keys() - OF_THE_SUITE)
    }
    for number in range(num):
        options = {name: decks[name][number] for name in sorted(decks)}
        given = {name: value for name, value in options.items() if value is not None}
        if "profile" in given:
            given["profile"] = given["profile"]()
        later = (1, draw.randrange(2, 12), 1) if chunked else (1, 1)
        yield Run(given.pop("dtype"), (draw.randrange(20, 140), *later), given)


def _shuffled(draw: random.Random, num: int, values: Any) -> list[Any]:
    found = [values[i % len(values)] for i in range(num)]
    draw.shuffle(found)
    return found


def _possible(subject: Subject, dealt: Dealt) -> Dealt:
    """As many of the changes as make, together, a model in transformers that the adapter does not
    say to be none of its own.
    """
    if _can(subject, dealt):
        return dealt
    kept = Dealt(())
    for group in dealt.groups:
        if not _can(subject, Dealt((group,))):
            continue
        more = Dealt((*kept.groups, group))
        if _can(subject, more):
            kept = more
    return kept


def _can(subject: Subject, dealt: Dealt) -> bool:
    config = dealt.applied(subject.config)
    try:
        with torch.no_grad():
            random_model(config)(torch.arange(5, 5 + _FEW)[None])
    except Exception:  # noqa: BLE001 - whatever transformers says of such a config
        return False
    refusal = ""
    try:
        subject.adapter.layout(subject.adapter.text_config(config))
    except UnsupportedError as error:
        refusal = str(error)
    except Exception:  # noqa: BLE001 - which the run says better
        return True
    alone = len(dealt.groups) == 1 and only_sizes(dealt.groups[0])
    assert not (refusal and alone), (
        f"tiny_config() with {dealt}: expected no size to be refused, got: {refusal}"
    )
    return not refusal


def _same(subject: Subject, dealt: Dealt, run: Run) -> bool:
    """Raises AssertionError unless all is transformers'. Returns whether that runs such a model."""
    config = dealt.applied(subject.config)
    vocab_size = int(kept_names(subject, config).parameters[_embedding(subject, config)][0])
    prompt = subject.prompt(sum(run.lengths), vocab_size=vocab_size)
    pieces = prompt.split(list(run.lengths))
    try:
        directory = subject.checkpoint(config, run.dtype)
        reference = Reference(
            directory, DTYPES[run.dtype], chunk_size=run.options.get("chunk_size", 1 << 20)
        )
        cache = reference.new_cache()
        expected = reference.run_pieces(pieces, cache=cache)
    except Exception:  # noqa: BLE001 - as sizes that do not go together
        return False
    if not torch.isfinite(expected).all():
        return False
    try:
        text = subject.adapter.text_config(config)
        same_kinds(subject.adapter.caches(text), cache, "caches")
        names = kept_names(subject, config)
        stored = STORED_DTYPES[run.dtype]
        said = described_tensors(subject.adapter, text, names.parameters, stored)
        if said is not None:
            same_forms(said, names.stored(stored), "planned without its files")
        with subject.open(directory, dtype=run.dtype, **run.options) as model:
            found = run_pieces(model, pieces)
            same_parameters(subject, model, text, reference, "weights")
        same_bits(found, expected, "logits")
        if run.dtype == "float32" and supports(subject.adapter, "blockwise-attention"):
            blocks = run.options | {"attention": "blockwise", "precision": "fast"}
            with subject.open(directory, **blocks) as model:
                found = run_pieces(model, pieces)
            what = "block-wise logits"
            within_rounding(found, expected, _BLOCKWISE, reference, pieces, what)
    except AssertionError:
        raise
    except Exception as error:
        text_of_it = " ".join(str(error).split())
        raise AssertionError(f"expected a run, got {type(error).__name__}: {text_of_it}") from error
    return True


def _embedding(subject: Subject, config: dict[str, Any]) -> str:
    """The name of the table of the embedding."""
    layout = subject.adapter.layout(subject.adapter.text_config(config))
    return f"{layout.embedding}.weight"


def _shrunk(
    subject: Subject, dealt: Dealt, run: Run, error: AssertionError, until: float
) -> tuple[Dealt, AssertionError]:
    """The changes without those that are not needed for an error, looked for until then."""
    number = 0
    while number < len(dealt.groups) and time.monotonic() < until:
        fewer = dealt.without(number)
        try:
            _same(subject, fewer, run)
            number += 1
        except AssertionError as found:
            dealt, error = fewer, found
    return dealt, error
