"""Encodes prompts as token ids, with a chat template or as they are.

Documents and questions are text. What in them spells a control token, `<|im_end|>` say, becomes
plain characters, so that a document cannot end the user's turn and speak as the system; only what
the template writes is one. A text that spells none is encoded as transformers does it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ollm_core.text.control_tokens import ControlTokens, Marks
from ollm_core.text.templates import ChatTemplate, Message

_HARMLESS = "x"


def encode_chat(
    tokenizer: Any,
    template: ChatTemplate,
    messages: Sequence[Message],
    options: Mapping[str, Any] | None = None,
    *,
    allow_special_tokens: bool = False,
) -> list[int]:
    """`encode_chats` of one conversation."""
    how = {"allow_special_tokens": allow_special_tokens}
    return encode_chats(tokenizer, template, [messages], options, **how)[0]


def encode_chats(
    tokenizer: Any,
    template: ChatTemplate,
    conversations: Sequence[Sequence[Message]],
    options: Mapping[str, Any] | None = None,
    *,
    allow_special_tokens: bool = False,
) -> list[list[int]]:
    """The ids of the messages of each conversation, up to where the assistant speaks. All are
    rendered at once.

    `options` are variables that some templates know, as `reasoning_effort`. With
    `allow_special_tokens` the messages may spell control tokens. Raises ConfigError if the template
    cannot be used, InputError if messages cannot be told from control tokens.
    """

    def tokens(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    if allow_special_tokens:
        return [tokens(text) for text in template.render(conversations, options)]
    control = ControlTokens(tokenizer, template.source)
    wanted: list[Sequence[Message]] = []
    encoders: list[Callable[[str], list[int]]] = []
    for messages in conversations:
        contents = [message["content"] for message in messages]
        shown = messages
        encode: Callable[[str], list[int]] = tokens
        if spelled := control.spelled(*contents):
            marks = Marks(tokenizer, control, spelled, [template.source, *contents])
            shown, encode = _with_contents(messages, marks.mark), marks.encode
        wanted += [_with_contents(messages, _harmless), shown]
        encoders.append(encode)
    texts = template.render(wanted, options)
    found = []
    for encoder, harmless, text in zip(encoders, texts[::2], texts[1::2], strict=True):
        found.append(encoder(text))
        control.check(found[-1], tokens(harmless))
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


def _with_contents(messages: Sequence[Message], change: Callable[[str], str]) -> list[Message]:
    return [{**message, "content": change(message["content"])} for message in messages]


def _harmless(text: str) -> str:
    """A text that is blank where `text` is, for a template that asks."""
    return _HARMLESS if text.strip() else text
