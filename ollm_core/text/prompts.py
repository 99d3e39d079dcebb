"""Prompts: the token ids of what users say, by the model's chat template or as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ollm_core.errors import InputError
from ollm_core.text.answer_form import AnswerForm
from ollm_core.text.chat import encode_chats, encode_text
from ollm_core.text.templates import ChatTemplate, Message


class PromptEncoder:
    """Makes prompts for one model."""

    def __init__(
        self,
        tokenizer: Any,
        system: str | None = None,
        options: Mapping[str, Any] | None = None,
        *,
        raw: bool = False,
        allow_special_tokens: bool = False,
    ) -> None:
        """Texts follow the message `system`, if there is one. `options` are variables of the chat
        template, which `raw` goes without. With `allow_special_tokens` texts may spell control
        tokens.

        Raises InputError without a tokenizer, for a system message without a template, and for a
        template that does not have an effort of reasoning.
        """
        if tokenizer is None:
            raise InputError("the model has no tokenizer", hint="add its tokenizer.json")
        self._tokenizer = tokenizer
        self._template = None if raw else ChatTemplate.of(tokenizer)
        self._system = system
        self._options = dict(options or {})
        self._special = allow_special_tokens
        if system and self._template is None:
            raise InputError("the model has no chat template", hint="leave the system message out")
        if "reasoning_effort" in self._options and (
            self._template is None or "reasoning_effort" not in self._template.source
        ):
            raise InputError(
                "the model's chat template has no reasoning effort", hint="leave it out"
            )

    def of_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of each text, as a user's message where there is a template. Raises
        InputError, ConfigError.
        """
        if self._template is None:
            how = {"allow_special_tokens": self._special}
            return [encode_text(self._tokenizer, text, **how) for text in texts]
        before = [{"role": "system", "content": self._system}] if self._system else []
        return self.of_chats([[*before, {"role": "user", "content": text}] for text in texts])

    def answer_form(self, prompt: Sequence[int]) -> AnswerForm:
        """How the model writes answers to a prompt, of token ids, that was made here."""
        if self._template is None:
            return AnswerForm()
        return AnswerForm.after(self._tokenizer, self._template, prompt)

    def of_chats(self, conversations: Sequence[Sequence[Message]]) -> list[list[int]]:
        """The token ids of each conversation, up to where the assistant speaks. Raises InputError
        without a template, ConfigError.
        """
        if self._template is None:
            raise InputError("the model has no chat template", hint="give one text")
        return encode_chats(
            self._tokenizer,
            self._template,
            conversations,
            self._options,
            allow_special_tokens=self._special,
        )
