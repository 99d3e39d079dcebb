"""The contract of a draft source."""

from __future__ import annotations

import random
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ollm_conformance.checks import check, does_not_apply
from ollm_conformance.compare import same_tokens
from ollm_conformance.parts.base import nothing_left, process_as_it_was, refusal
from ollm_conformance.parts.drafter_suite import LIMIT, MOST, DrafterSuite
from ollm_conformance.parts.drafter_walk import DrafterWalk
from ollm_conformance.parts.texts import OpenDrafter, answer, random_text, texts
from ollm_conformance.process_memory import every_time, process_memory
from ollm_conformance.seeds import run_seed
from ollm_core import DoesNotFitError, FollowsText

SOME = 4
QUICK_SECONDS = 2.0
"""Of CPU, for one draft after a long text: as long as many weight passes."""


class DrafterConformance(DrafterSuite):
    """Every check of a draft source. Subclass it as `TestX` and write `open_drafter`."""

    @check(
        "drafter.answer",
        "A draft is at most as many token ids of the vocabulary as were asked for, or none, "
        "whatever the text and however long.",
        look="what is returned: a tensor of integers [n] or a sequence of int; num_tokens; ids "
        "that are computed",
    )
    def test_answer(self) -> None:
        again = random_text(7, self.vocab_size, 7).repeat(20)
        grown = {f"{n} tokens of a text that repeats itself": again[:n] for n in range(len(again))}
        with self.opened() as opened:
            for name, text in {**texts(self.vocab_size), **grown}.items():
                for num_tokens in (3,) if name in grown else (1, 2, MOST, 0):
                    what = f"{num_tokens} tokens after {name}"
                    found = opened.draft(text, num_tokens, what)
                    assert len(found) <= num_tokens, (
                        f"{what}: expected at most {num_tokens} tokens, got {len(found)}"
                    )
                    foreign = [token for token in found if not 0 <= token < self.vocab_size]
                    assert not foreign, (
                        f"{what}: expected ids from 0 to {self.vocab_size - 1}, got {foreign[0]}"
                    )

    @check(
        "drafter.short-texts",
        "Texts of no token, one or a few have a draft too, if only an empty one.",
        look="windows and slices of a text that is shorter than they are",
    )
    def test_short_texts(self) -> None:
        with self.opened() as opened:
            for length in (0, 1, 2, 3, 4, 0):
                text = random_text(length, self.vocab_size, length)
                for num_tokens in (1, MOST):
                    what = f"{num_tokens} tokens after a text of {length}"
                    found = opened.draft(text, num_tokens, what)
                    assert len(found) <= num_tokens, (
                        f"{what}: expected at most {num_tokens} tokens, got {len(found)}"
                    )

    @check(
        "drafter.pure",
        "The text that is given stays as it is.",
        look="operations in place on token_ids, and on views of it that are returned",
    )
    def test_pure(self) -> None:
        with self.opened() as opened:
            for name, text in texts(self.vocab_size).items():
                given = text.clone()
                opened.draft(given, MOST, name)
                same_tokens(given.tolist(), text.tolist(), f"{name}, after a draft")

    @check(
        "drafter.repeatable",
        "The same question has the same answer, once and again, from one source and another.",
        look="random choices; what is kept from one question to the next",
    )
    def test_repeatable(self) -> None:
        self._must_not_learn()
        wanted = list(texts(self.vocab_size).items())
        first: dict[str, list[int]] = {}
        for order, source in ((wanted, "one source"), (wanted[::-1], "another source")):
            with self.opened() as opened:
                for time in ("once", "again"):
                    for name, text in order:
                        found = opened.draft(text, SOME, name)
                        told = f"{name}, asked {time} of {source}"
                        same_tokens(found, first.setdefault(name, found), told)

    @check(
        "drafter.follows",
        "As a text grows by right and wrong tokens, is cut back or is another one, the draft is "
        "that of a source that begins with it.",
        look="what is kept of the text so far: compare it with the text that is asked about",
    )
    def test_follows(self) -> None:
        self._must_not_learn()
        for name in ("a phrase that comes back", "counting down to token 0"):
            text = texts(self.vocab_size)[name]
            asked = [
                ("as it begins", text[:-3]),
                ("one token later", text[:-2]),
                ("two tokens later", text),
                ("cut back", text[:-6]),
                ("with another end", torch.cat([text[:-8], text[:7]])),
                ("after another text of its length", random_text(len(text), self.vocab_size, 8)),
                ("again", text),
                ("after a shorter one", text[len(text) // 2 :]),
            ]
            first: dict[str, list[int]] = {}
            other = asked.pop(5)
            for order in ([*asked, other], [other, *asked[::-1]]):  # another one begins each
                with self.opened() as opened:
                    for what, ids in order:
                        told = f"{name}, {what}"
                        found = opened.draft(ids, SOME, told)
                        same_tokens(found, first.setdefault(what, found), told)

    @check(
        "drafter.walk",
        "Whatever texts come, grow by right and wrong tokens, are cut, begun, read and given up, a "
        "draft is that of a new source, what was given stays, and memory is what was reserved.",
        look="what is kept of texts and drafts: by reference, by length or from the call before",
    )
    def test_walk(self) -> None:
        draw = random.Random(run_seed())
        with self.opened(0) as opened:  # one that reads texts may be a model, and slow
            num_walks = 2 if isinstance(opened.drafter, FollowsText) else 10
        for number in range(num_walks):
            DrafterWalk(type(self), draw).run(f"seed {run_seed()}, walk {number}")

    @check(
        "drafter.process",
        "To be told of a text and to draft leaves torch's threads, random numbers and modes, and "
        "the process's environment as they were.",
        look="random choices: with a generator of your own; torch.manual_seed is everybody's",
    )
    def test_process(self) -> None:
        with self.opened() as opened:
            for name, text in texts(self.vocab_size).items():
                with process_as_it_was(f"a draft after {name}"):
                    opened.draft(text, MOST, name)

    @check(
        "drafter.begin",
        "A source that follows texts drafts the same after each of them, and gives back what it "
        "held for a text when there is none to draft for.",
        look="begin(): 0, less and more than before; catch_up()",
    )
    def test_begin(self) -> None:
        with self.opened(0) as opened:
            if not isinstance(opened.drafter, FollowsText):
                does_not_apply("it has no begin() and catch_up()")
            empty = opened.used
            text = random_text(60, self.vocab_size, 4)
            drafts = []
            for number, most in enumerate((80, self.longest, 70)):
                what = f"text {number + 1}, of at most {most} tokens"
                opened.begin(most)
                given = text.clone()
                opened.catch_up(given)
                same_tokens(given.tolist(), text.tolist(), f"{what}, after catch_up()")
                opened.catch_up(text)
                drafts.append(opened.draft(text, MOST, what))
                opened.catch_up(text[:20])
                if not self.learns:
                    same_tokens(drafts[-1], drafts[0], what)
            used = []
            for most in (self.longest, 70, self.longest):
                opened.begin(most)
                used.append(opened.used)
            assert used[2] <= used[0], (
                f"text after text: expected at most {used[0]} bytes reserved for one of "
                f"{self.longest} tokens, as at first, got {used[2]}"
            )
            opened.begin(0)
            assert opened.used == empty, (
                f"after begin(0): expected {empty} bytes reserved as before any text, got "
                f"{opened.used}"
            )

    @check(
        "drafter.does-not-fit",
        "Where there is no memory for a text, it is refused before it begins, and nothing changes.",
        look="begin(): reserve all in the account first, and raise DoesNotFitError",
    )
    def test_does_not_fit(self) -> None:
        with self.opened(0) as opened:
            if not isinstance(opened.drafter, FollowsText):
                does_not_apply("it has no begin() and catch_up()")
            used = opened.used
            opened.begin(self.longest)
            needed = opened.used - used
            opened.begin(0)
            if not needed:
                does_not_apply("a text takes no memory")
            for account in opened.accounts:
                account.limit = account.used
            what = f"a text that needs {needed} bytes where none is free"
            refusal(DoesNotFitError, partial(opened.drafter.begin, self.longest), what)
            assert opened.used == used, f"{what}: expected {used} bytes reserved, got {opened.used}"
            for account in opened.accounts:
                account.limit = LIMIT
            opened.begin(self.longest)
            opened.draft(random_text(30, self.vocab_size, 5), MOST, "when there is memory again")

    @check(
        "drafter.memory",
        "The process holds what the source has reserved and no more, however many texts it was "
        "asked about, and nothing when it is closed.",
        look="texts, tables and drafts that are kept and in no account: Python's own objects count",
    )
    @every_time
    def test_memory(self) -> None:
        size = 500_000  # 4 MB of ids
        with self.opened() as opened:  # what is made once is made here
            opened.draft(random_text(60, self.vocab_size, 6), MOST, "at first")
        del opened
        with process_memory() as memory:
            with self.opened() as opened:
                for seed in range(8):
                    text = random_text(size, self.vocab_size, seed)
                    opened.draft(text, 2, f"a text of {size} tokens")
                del text
                reserved = "which the accounts have reserved"
                memory.expect(opened.used, f"after 8 texts of {size} tokens", reserved)
            del opened
            memory.expect(0, "a source that is gone", "as before it was made")

    @check(
        "drafter.long-texts",
        "A draft after a long text comes in less time than it could save.",
        look="loops over the text, in Python or over all pairs of its tokens",
    )
    def test_long_texts(self) -> None:
        for length in (1000, 4000, 16_000, 64_000):
            text = random_text(length, self.vocab_size, 7)
            with self.opened() as opened:
                opened.catch_up(text)
                start = time.process_time()
                opened.draft(text, MOST, f"a text of {length} tokens")
                seconds = time.process_time() - start
            assert seconds <= QUICK_SECONDS, (
                f"a text of {length} tokens: expected a draft in at most {QUICK_SECONDS} s of CPU "
                f"time, got {seconds:.1f}"
            )

    @check(
        "drafter.two-sources",
        "Two sources, of two models on two threads, do not see each other.",
        look="state of the class or the module",
    )
    def test_two_sources(self) -> None:
        self._must_not_learn()
        wanted = list(texts(self.vocab_size).items())

        def ask(source: OpenDrafter, order: list[tuple[str, Tensor]]) -> dict[str, list[int]]:
            return {name: source.draft(text, SOME, name) for name, text in order * 2}

        with self.opened() as opened:
            alone = ask(opened, wanted)
        with self.opened() as one, self.opened() as other, ThreadPoolExecutor(2) as pool:
            both = list(pool.map(ask, (one, other), (wanted, wanted[::-1])))
            turns: dict[str, list[int]] = {}
            for (name, text), (_, second) in zip(wanted, wanted[::-1], strict=True):
                one.catch_up(text)
                other.draft(second, SOME, name)
                turns[name] = answer(one.drafter, text, SOME, name)
        for what, found in (("at once", both[0]), ("at once", both[1]), ("in turn", turns)):
            for name, expected in alone.items():
                same_tokens(found[name], expected, f"{name}, asked {what} with another source")

    @check(
        "drafter.closed",
        "A source can be closed twice, used or not, and leaves no memory, file or thread.",
        look="close()",
    )
    def test_closed(self) -> None:
        for length in (0, 30):
            with tempfile.TemporaryDirectory() as name, nothing_left(Path(name)):
                opened = self.open(Path(name))
                if length:
                    opened.begin(self.longest)
                    opened.draft(random_text(length, self.vocab_size, 9), MOST, "before closing")
                opened.close()
                opened.close()
                if isinstance(opened.drafter, FollowsText) or opened.used:
                    assert opened.used == 0, (
                        f"a closed source: expected empty accounts, got {opened.used} bytes"
                    )

    @classmethod
    def _must_not_learn(cls) -> None:
        if cls.learns:
            does_not_apply("`learns` says that it may draft from earlier questions")
