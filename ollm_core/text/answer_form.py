"""How a model writes its answers, by its chat template: thoughts, text, and calls of functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ollm_core.text.harmony import OPENING, HarmonyParser
from ollm_core.text.templates import ChatTemplate
from ollm_core.text.thoughts import Thought, ThoughtForm, ThoughtParser
from ollm_core.text.thoughts import form_of as thought_form_of
from ollm_core.text.tool_calls import BareCalls, Call, MarkedCalls, Piece
from ollm_core.text.tool_forms import ToolForm
from ollm_core.text.tool_forms import form_of as tool_form_of

_END_TOKENS = 16  # of a prompt: enough for what opens a thought


class _Parser(Protocol):
    def add(self, text: str) -> Sequence[Piece]: ...

    def finish(self) -> Sequence[Piece]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerForm:
    """Of the answers to one prompt."""

    thoughts: ThoughtForm | None = None
    is_begun: bool = False
    """Whether the prompt ends with what opens a thought."""
    calls: ToolForm | None = None
    tools: Sequence[Mapping[str, Any]] = ()
    """What may be called, in OpenAI's form."""
    is_bound: bool = False
    """The answer follows a grammar: it has no thoughts, and no marks around a call."""

    @classmethod
    def after(cls, tokenizer: Any, template: ChatTemplate, prompt: Sequence[int]) -> AnswerForm:
        """Of a model with this chat template, after a prompt of token ids."""
        end = tokenizer.decode(list(prompt[-_END_TOKENS:]), skip_special_tokens=False)
        return cls.of(template.source, str(end))

    @classmethod
    def of(cls, template: str, prompt_end: str = "") -> AnswerForm:
        """The same, of texts."""
        thoughts = thought_form_of(template)
        is_begun = thoughts is not None and prompt_end.rstrip().endswith(thoughts.open)
        return cls(thoughts=thoughts, is_begun=is_begun, calls=tool_form_of(template))

    @property
    def has_thoughts(self) -> bool:
        """Whether such a model may think."""
        return self.thoughts is not None or self._is_harmony

    @property
    def opening(self) -> str:
        """What is written for the model where its answer must begin at once."""
        if self._is_harmony:
            return OPENING
        return f"\n{self.thoughts.close}\n\n" if self.thoughts and self.is_begun else ""

    def control_ids(self, tokenizer: Any) -> list[int]:
        """Ids of control tokens that are looked for, which texts of answers else leave out."""
        known = tokenizer.get_added_vocab()
        return [known[token] for token in self.control if token in known]

    @property
    def control(self) -> tuple[str, ...]:
        """What may be control tokens."""
        if self.is_bound:
            return ()
        thoughts = (self.thoughts.open, self.thoughts.close) if self.thoughts else ()
        return thoughts + (self.calls.control if self.calls and self._reads_calls else ())

    @property
    def _is_harmony(self) -> bool:
        return self.calls is not None and self.calls.has_channels

    @property
    def _reads_calls(self) -> bool:
        return bool(self.tools) or self._is_harmony

    def parsers(self) -> list[_Parser]:
        """Of one answer: the text that one leaves is for the next."""
        if self.calls is None or not self._reads_calls or self.is_bound:
            calls: list[_Parser] = []
            if self.calls is not None and self.tools:
                calls = [BareCalls(self.calls, self.tools)]
        elif self._is_harmony:
            calls = [HarmonyParser(self.calls, self.tools)]
        else:
            parser = MarkedCalls if self.calls.open else BareCalls
            calls = [parser(self.calls, self.tools)]
        if self.thoughts is None or self.is_bound:
            return calls
        return [ThoughtParser(self.thoughts, is_begun=self.is_begun), *calls]


class Said:
    """What one answer thinks, says, and wants called, as it grows."""

    def __init__(self, form: AnswerForm) -> None:
        self.text = ""
        self.thoughts = ""
        self.calls: list[Call] = []
        self._parsers = form.parsers()

    def add(self, text: str, *, last: bool = False) -> list[Piece]:
        """More of the answer; -> what is new and certain."""
        pieces: list[Piece] = [text] if text else []
        for parser in self._parsers:
            found: list[Piece] = []
            for piece in pieces:
                found += parser.add(piece) if isinstance(piece, str) else [piece]
            pieces = [*found, *(parser.finish() if last else ())]
        for piece in pieces:
            if isinstance(piece, Call):
                self.calls.append(piece)
            elif isinstance(piece, Thought):
                self.thoughts += piece.text
            else:
                self.text += piece
        return pieces
