"""Draft sources with one fault each, on top of two plain ones."""

from __future__ import annotations

import os
import random
import threading
from typing import ClassVar

import torch
from broken import BrokenPart

from ollm_conformance import DrafterConformance
from ollm_core import DoesNotFitError
from ollm_core.contracts.closing import Closing
from ollm_core.contracts.drafting import FollowsText


class Echo:
    """What came after the last token where it stood before."""

    def __init__(self, request):
        self.vocab_size = request.vocab_size

    def __call__(self, token_ids, num_tokens):
        return self.draft(token_ids, num_tokens)

    def draft(self, token_ids, num_tokens):
        """The draft."""
        if len(token_ids) < 2:
            return []
        (places,) = (token_ids[:-1] == token_ids[-1]).nonzero(as_tuple=True)
        if not len(places):
            return []
        begin = int(places[-1]) + 1
        return token_ids[begin : begin + num_tokens].tolist()


class Keeper(Echo, Closing, FollowsText):
    """Keeps a copy of the text in room that it has reserved."""

    def __init__(self, request):
        super().__init__(request)
        self.account = request.host_account
        self.room = torch.zeros(0, dtype=torch.long)
        self.held = 0
        self.length = 0

    def begin(self, num_tokens):
        self.reserve(8 * num_tokens)
        self.room = torch.zeros(num_tokens, dtype=torch.long)
        self.length = 0

    def reserve(self, num_bytes):
        """Hold so much, and no more what was held before."""
        more = num_bytes - self.held
        if more > 0:
            self.account.reserve("text", more)
        else:
            self.account.release("text", -more)
        self.held = num_bytes

    def catch_up(self, token_ids):
        self.length = min(len(token_ids), len(self.room))
        self.room[: self.length] = token_ids[: self.length]

    def close(self):
        self.reserve(0)
        self.room, self.length = self.room[:0].clone(), 0


def suite_of(source, **attributes):
    """The suite for a draft source."""

    class Suite(DrafterConformance):
        @classmethod
        def open_drafter(cls, request):
            return source(request)

    for name, value in attributes.items():
        setattr(Suite, name, value)
    return Suite


class MoreThanAsked(Echo):
    def draft(self, token_ids, num_tokens):
        return super().draft(token_ids, num_tokens + 1)


class NextNumber(Echo):
    def draft(self, token_ids, num_tokens):
        last = token_ids[-1:].tolist()
        return [token + 1 for token in last][:num_tokens]


class Floats(Echo):
    def draft(self, token_ids, num_tokens):
        return [float(token) for token in super().draft(token_ids, num_tokens)]


class ARow(Echo):
    def draft(self, token_ids, num_tokens):
        return torch.tensor([super().draft(token_ids, num_tokens)])


class AlwaysOne(Echo):
    def draft(self, token_ids, num_tokens):
        return super().draft(token_ids, num_tokens) or token_ids[-1:].tolist()


class FailsForNoText(Echo):
    def draft(self, token_ids, num_tokens):
        assert int(token_ids[-1]) >= 0
        return super().draft(token_ids, num_tokens)


class WindowOfThree(Echo):
    def draft(self, token_ids, num_tokens):
        token_ids.unfold(0, 3, 1)
        return super().draft(token_ids, num_tokens)


class SortsTheText(Echo):
    def draft(self, token_ids, num_tokens):
        found = super().draft(token_ids, num_tokens)
        token_ids.copy_(token_ids.sort().values)
        return found


class MarksTheLast(Echo):
    def draft(self, token_ids, num_tokens):
        found = super().draft(token_ids, num_tokens)
        token_ids[-1:] = -1
        return found


class AtRandom(Echo):
    def draft(self, token_ids, num_tokens):
        return [random.randrange(self.vocab_size) for _ in range(num_tokens)]


class EverySecondTime(Echo):
    asked = 0

    def draft(self, token_ids, num_tokens):
        self.asked += 1
        return super().draft(token_ids, num_tokens) if self.asked % 2 else []


class PreviousText(Echo):
    """Takes what is asked about for the text before and some more."""

    text = torch.zeros(0, dtype=torch.long)

    def draft(self, token_ids, num_tokens):
        self.text = torch.cat([self.text, token_ids[len(self.text) :]])
        return super().draft(self.text, num_tokens)


class KnowsByLength(Echo):
    """Keeps drafts by the length of the text."""

    def __init__(self, request):
        super().__init__(request)
        self.drafts = {}

    def draft(self, token_ids, num_tokens):
        key = len(token_ids), num_tokens
        if key not in self.drafts:
            self.drafts[key] = super().draft(token_ids, num_tokens)
        return self.drafts[key]


class TextByItsPlace(Echo):
    """A text of the same length in the same place is taken for the last one."""

    last = None, None

    def draft(self, token_ids, num_tokens):
        place = token_ids.data_ptr(), len(token_ids), num_tokens
        if place != self.last[0]:
            self.last = place, super().draft(token_ids, num_tokens)
        return list(self.last[1])


class DraftsWhatItHasRead(Keeper):
    """The text of a question is not looked at: it has been read before, as a rule."""

    def draft(self, token_ids, num_tokens):
        return super().draft(self.room[: self.length], num_tokens)


class FirstNumberAsked(Echo):
    """More tokens than were asked for at first are not looked for, as long as the text stays."""

    last = None, None

    def draft(self, token_ids, num_tokens):
        if self.last[0] is None or not token_ids.equal(self.last[0]):
            self.last = token_ids.clone(), super().draft(token_ids, num_tokens)
        return self.last[1][:num_tokens]


class SeedsPython(Echo):
    """Chooses at random, and the same again: by a seed for all of the process."""

    def draft(self, token_ids, num_tokens):
        random.seed(len(token_ids))
        return super().draft(token_ids, num_tokens)


class BeginKeeps(Keeper):
    def begin(self, num_tokens):
        if num_tokens:
            super().begin(num_tokens)


class ReadsTwice(Keeper):
    """Each reading adds to what was read before."""

    def catch_up(self, token_ids):
        new = token_ids[: len(self.room) - self.length]
        self.room[self.length : self.length + len(new)] = new
        self.length += len(new)

    def draft(self, token_ids, num_tokens):
        return super().draft(self.room[: self.length], num_tokens)


class TakesSomeFirst(Keeper):
    def begin(self, num_tokens):
        self.account.limit += 64
        self.account.reserve("table", 64 if num_tokens else 0)
        super().begin(num_tokens)
        self.account.release("table", 64 if num_tokens else 0)


class MemoryErrors(Keeper):
    def begin(self, num_tokens):
        try:
            super().begin(num_tokens)
        except DoesNotFitError as error:
            raise MemoryError(num_tokens) from error


class KeepsTexts(Echo):
    def __init__(self, request):
        super().__init__(request)
        self.texts = []

    def draft(self, token_ids, num_tokens):
        self.texts.append(token_ids.clone())
        return super().draft(token_ids, num_tokens)


class KeepsBytes(Echo):
    kept: ClassVar = []

    def draft(self, token_ids, num_tokens):
        if len(token_ids) > 100_000:
            self.kept.append(token_ids.numpy().tobytes())
        return super().draft(token_ids, num_tokens)


class UnreservedTable(Keeper):
    def begin(self, num_tokens):
        super().begin(num_tokens)
        self.table = bytearray(b"\1") * (32 << 20) if num_tokens else None


class AllPairs(Echo):
    def draft(self, token_ids, num_tokens):
        for i in range(len(token_ids)):
            for j in range(len(token_ids)):
                if i != j and token_ids[i] == token_ids[j] == token_ids[-1]:
                    break
        return super().draft(token_ids, num_tokens)


class LastAsked(Echo):
    """Begins anew where another source was asked before."""

    last: ClassVar = None

    def draft(self, token_ids, num_tokens):
        again = LastAsked.last is self
        LastAsked.last = self
        return super().draft(token_ids, num_tokens) if again else []


class SharedRoom(Keeper):
    """One text for all sources."""

    rooms: ClassVar = {}

    def catch_up(self, token_ids):
        self.rooms["text"] = token_ids.clone()

    def draft(self, token_ids, num_tokens):
        return super().draft(self.rooms["text"], num_tokens)


class ClosesOnce(Keeper):
    def close(self):
        self.account.release("text", self.held)
        self.room = None

    def reserve(self, num_bytes):
        super().reserve(num_bytes)
        self.held = num_bytes


class KeepsTheAccount(Keeper):
    def close(self):
        pass


class LeavesAThread(Keeper):
    thread = None

    def close(self):
        super().close()
        if self.thread is None:
            self.thread = threading.Thread(
                target=threading.Event().wait, args=(2,), name="left", daemon=True
            )
            self.thread.start()


class LeavesAFile(Keeper):
    def __init__(self, request):
        super().__init__(request)
        self.file = os.open(request.directory, os.O_RDONLY)

    def __del__(self):
        os.close(self.file)


BROKEN_DRAFTERS = [
    BrokenPart(name, fault, suite, f"drafter.{check}")
    for name, fault, suite, check in [
        ("more-than-asked", "One token more than asked for is drafted.",
         suite_of(MoreThanAsked), "answer"),
        ("out-of-vocabulary", "The number after the last token is drafted, token or not.",
         suite_of(NextNumber), "answer"),
        ("floats", "Drafts are floats.", suite_of(Floats), "answer"),
        ("a-row", "Drafts are rows of a batch.", suite_of(ARow), "answer"),
        ("always-one", "A token is drafted where none was asked for.",
         suite_of(AlwaysOne), "answer"),
        ("no-text", "A text without a token is an error.",
         suite_of(FailsForNoText), "short-texts"),
        ("three-tokens", "A text of less than three tokens is an error.",
         suite_of(WindowOfThree), "short-texts"),
        ("sorts-the-text", "The given text is sorted in place.", suite_of(SortsTheText), "pure"),
        ("marks-the-last", "The last token of the given text is overwritten.",
         suite_of(MarksTheLast), "pure"),
        ("at-random", "Drafts are random.", suite_of(AtRandom), "repeatable"),
        ("every-second-time", "Every second question is answered.",
         suite_of(EverySecondTime), "repeatable"),
        ("previous-text", "A text is taken for the one before and some more.",
         suite_of(PreviousText), "follows"),
        ("by-length", "Texts of one length have one draft.", suite_of(KnowsByLength), "follows"),
        ("text-by-its-place", "A text where another one of its length was is taken for that.",
         suite_of(TextByItsPlace), "walk"),
        ("drafts-what-it-has-read", "A text that comes without being read before is not seen.",
         suite_of(DraftsWhatItHasRead), "walk"),
        ("first-number-asked", "The first question decides how long drafts for a text are.",
         suite_of(FirstNumberAsked), "walk"),
        ("seeds-python", "Python's random numbers begin anew with each draft.",
         suite_of(SeedsPython), "process"),
        ("begin-keeps", "What was held for a text stays when there is none to draft for.",
         suite_of(BeginKeeps), "begin"),
        ("reads-twice", "A text that is read again comes twice.", suite_of(ReadsTwice), "begin"),
        ("takes-some-first", "A refused text keeps some of what it tried to take.",
         suite_of(TakesSomeFirst), "does-not-fit"),
        ("memory-error", "A text without room is a MemoryError.",
         suite_of(MemoryErrors), "does-not-fit"),
        ("keeps-texts", "All texts are kept.", suite_of(KeepsTexts), "memory"),
        ("keeps-bytes", "The bytes of all texts are kept by the class.",
         suite_of(KeepsBytes), "memory"),
        ("unreserved-table", "A table for the text is in no account.",
         suite_of(UnreservedTable), "memory"),
        ("all-pairs", "All pairs of tokens are compared.", suite_of(AllPairs), "long-texts"),
        ("last-asked", "The class remembers which source was asked last.",
         suite_of(LastAsked), "two-sources"),
        ("shared-room", "All sources keep their text in one place.",
         suite_of(SharedRoom), "two-sources"),
        ("closes-once", "Closing twice gives back twice.", suite_of(ClosesOnce), "closed"),
        ("keeps-the-account", "A closed source still holds its memory.",
         suite_of(KeepsTheAccount), "closed"),
        ("leaves-a-thread", "A thread goes on after closing.", suite_of(LeavesAThread), "closed"),
        ("leaves-a-file", "A file stays open after closing.", suite_of(LeavesAFile), "closed"),
    ]
]  # fmt: skip

GOOD_DRAFTERS = [suite_of(Echo), suite_of(Keeper)]
