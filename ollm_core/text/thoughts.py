"""Finds what a model thinks before it answers, in an answer as it grows."""

from __future__ import annotations

from dataclasses import dataclass

from ollm_core.text.detokenizer import begun_at_end


@dataclass(frozen=True, slots=True)
class Thought:
    """A part of what a model says to itself."""

    text: str


@dataclass(frozen=True, slots=True)
class ThoughtForm:
    """How a family writes its thoughts."""

    open: str
    close: str


FORMS = (
    ThoughtForm("<think>", "</think>"),  # Qwen 3, DeepSeek R1, GLM 4.5, SmolLM3 and many others
    ThoughtForm("<seed:think>", "</seed:think>"),  # Seed-OSS
    ThoughtForm("[THINK]", "[/THINK]"),  # Magistral
)


def form_of(template: str) -> ThoughtForm | None:
    """That of models with this chat template; None if it speaks of no thoughts."""
    return next((form for form in FORMS if form.close in template), None)


class ThoughtParser:
    """Takes one answer's text in pieces. Thoughts stand at its beginning; what looks like one later
    is text. White space around thoughts is not told.
    """

    def __init__(self, form: ThoughtForm, *, is_begun: bool = False) -> None:
        """`is_begun`: the prompt ends with what opens a thought."""
        self._form = form
        self._has_begun = is_begun
        self._has_ended = False
        self._at_edge = is_begun  # white space that comes next is left out
        self._held = ""

    def add(self, text: str) -> list[Thought | str]:
        """What is certain with more of the answer."""
        self._held += text
        if not self._has_begun and not self._has_ended:
            begun = self._held.lstrip()
            if self._form.open.startswith(begun[: len(self._form.open)]):
                if len(begun) < len(self._form.open):
                    return []
                self._held = begun[len(self._form.open) :]
                self._has_begun = self._at_edge = True
            else:
                self._has_ended = True
        told: list[Thought | str] = []
        if not self._has_ended:
            told += map(Thought, self._think())
        if self._has_ended:
            told += self._take(len(self._held))
        return told

    def finish(self) -> list[Thought | str]:
        """What is left."""
        rest, self._held = self._held, ""
        if self._has_begun and not self._has_ended:
            thought = (rest.lstrip() if self._at_edge else rest).rstrip()
            return [Thought(thought)] if thought else []
        return [rest] if rest else []

    def _think(self) -> list[str]:
        """More of the thought: all but what may be its end, or white space before that."""
        thought, close, _ = self._held.partition(self._form.close)
        if close:
            told = self._take(len(thought.rstrip()))
            self._held = self._held.lstrip()[len(close) :]
            self._has_ended = self._at_edge = True
            return told
        return self._take(len(self._held) - begun_at_end(self._held, self._form.close))

    def _take(self, count: int) -> list[str]:
        """So many characters of what is held, without the white space at an edge."""
        text, self._held = self._held[:count], self._held[count:]
        if self._at_edge:
            text = text.lstrip()
            self._at_edge = not text
        if self._has_ended:
            return [text] if text else []
        kept = text.rstrip()
        self._held = text[len(kept) :] + self._held
        return [kept] if kept else []
