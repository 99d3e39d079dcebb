"""Encodes prompts as token ids, with a chat template or as they are.

Documents and questions are text. What in them spells a control token, `<|im_end|>` say, becomes
plain characters, so that a document cannot end the user's turn and speak as the system; only what
the template writes is one. A text that spells none is encoded as transformers does it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ollm_core.text.control_tokens import ControlTokens, Marks
from ollm_core.text.templates import ChatTemplate, Message, Tool

_HARMLESS = "x"
_WORD = re.compile(r"[A-Za-z0-9_-]{1,64}")


def encode_chat(
    tokenizer: Any,
    template: ChatTemplate,
    messages: Sequence[Message],
    options: Mapping[str, Any] | None = None,
    *,
    tools: Sequence[Tool] = (),
    allow_special_tokens: bool = False,
) -> list[int]:
    """`encode_chats` of one conversation."""
    return encode_chats(
        tokenizer,
        template,
        [messages],
        options,
        tools=tools,
        allow_special_tokens=allow_special_tokens,
    )[0]


def encode_chats(
    tokenizer: Any,
    template: ChatTemplate,
    conversations: Sequence[Sequence[Message]],
    options: Mapping[str, Any] | None = None,
    *,
    tools: Sequence[Tool] = (),
    allow_special_tokens: bool = False,
) -> list[list[int]]:
    """The ids of the messages of each conversation, up to where the assistant speaks. All are
    rendered at once.

    `options` are variables that some templates know, as `reasoning_effort`; `tools` are functions
    that the model may call, whose texts are as those of messages. With
    `allow_special_tokens` all of them may spell control tokens. Raises ConfigError if the template
    cannot be used, InputError if messages cannot be told from control tokens.
    """

    def tokens(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    if allow_special_tokens:
        texts = template.render(conversations, options, tools=[tools for _ in conversations])
        return [tokens(text) for text in texts]
    control = ControlTokens(tokenizer, template.source)
    wanted: list[Sequence[Message]] = []
    given: list[Sequence[Tool]] = []
    encoders: list[Callable[[str], list[int]]] = []
    for messages in conversations:
        contents = [*_texts(tools)]
        contents += [text for one in messages for text in _texts([*_said(one).values()])]
        shown, shown_tools = messages, tools
        encode: Callable[[str], list[int]] = tokens
        if spelled := control.spelled(*contents):
            marks = Marks(tokenizer, control, spelled, [template.source, *contents])
            shown = [{**one, **_with_texts(_said(one), marks.mark)} for one in messages]
            shown_tools, encode = _with_texts(tools, marks.mark), marks.encode
        harmless = _Harmless(spelled)
        wanted += [[harmless.message(one) for one in messages], shown]
        given += [_with_texts(tools, harmless.inside), shown_tools]
        encoders.append(encode)
    texts = template.render(wanted, options, tools=given)
    found = []
    for encoder, without, text in zip(encoders, texts[::2], texts[1::2], strict=True):
        found.append(encoder(text))
        control.check(found[-1], tokens(without))
    return found


def encode_text(tokenizer: Any, text: str, *, allow_special_tokens: bool = False) -> list[int]:
    """The ids of `text` as it is, between those that the tokenizer puts around any text.

    With `allow_special_tokens` the text may spell control tokens. Raises InputError if it cannot be
    told from them.
    """

    if allow_special_tokens:
        return list(tokenizer(text)["input_ids"])
    control = ControlTokens(tokenizer, str(tokenizer.chat_template or ""))
    around = tokenizer(_HARMLESS, return_special_tokens_mask=True)
    harmless = list(around["input_ids"])
    if spelled := control.spelled(text):
        marks = Marks(tokenizer, control, spelled, [text])
        mask = "".join(map(str, around["special_tokens_mask"]))  # 0 where the text is
        before = len(mask) - len(mask.lstrip("1"))
        after = len(mask.rstrip("1"))
        token_ids = [*harmless[:before], *marks.encode(marks.mark(text)), *harmless[after:]]
    else:
        token_ids = list(tokenizer(text)["input_ids"])
    control.check(token_ids, harmless)
    return token_ids


def _said(message: Message) -> dict[str, Any]:
    """What of a message is somebody's text, or has some."""
    return {name: value for name, value in message.items() if name != "role"}


def _texts(value: Any) -> Iterator[str]:
    """All texts in it, names too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, one in value.items():
            yield name
            yield from _texts(one)
    elif isinstance(value, Sequence):
        for one in value:
            yield from _texts(one)


def _with_texts(value: Any, change: Callable[[str], str]) -> Any:
    """The same with each text in it changed. Names stay apart from each other."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        changed: dict[str, Any] = {}
        for name, one in value.items():
            new = change(name)
            while new in changed:
                new += _HARMLESS
            changed[new] = _with_texts(one, change)
        return changed
    if isinstance(value, Sequence):
        return [_with_texts(one, change) for one in value]
    return value


class _Harmless:
    """Texts for a template that come to no control token."""

    def __init__(self, spelled: Sequence[str]) -> None:
        """`spelled` are the control tokens that some text has."""
        self._spelled = spelled

    def message(self, message: Message) -> Message:
        """With no text of its own, but for words that a template asks for."""
        inside = _with_texts(_said(message), self.inside)
        return {**message, **inside, "content": self._content(message["content"])}

    def inside(self, text: str) -> str:
        """A word, as "object" in a schema, stays: templates ask what it is."""
        if _WORD.fullmatch(text) and not any(one in text for one in self._spelled):
            return text
        return self._content(text)

    def _content(self, text: str) -> str:
        """A text that is blank where `text` is, for a template that asks."""
        return _HARMLESS if text.strip() else text
