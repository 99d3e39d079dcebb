"""Questions on one document, as prompts that begin alike: the document is computed once for all."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ollm_core.errors import InputError
from ollm_core.text.prompts import PromptEncoder

MAX_QUESTIONS = 4096
_PART = "This is part {number} of {total} of a document."
_NOTHING = "If this part says nothing about it, answer only: nothing."
_COMBINE = (
    "These are answers to one question from each part of a document, in their order. "
    "Answer the question from them."
)
_LEAST_PART = 64


def joined(*parts: str) -> str:
    """Texts that follow each other, without the blank ones."""
    return "\n\n".join(part for part in parts if part.strip())


def question_prompts(
    encoder: PromptEncoder, document: str, questions: Sequence[str]
) -> list[list[int]]:
    """The document, then the question, for each. Raises InputError for questions without words."""
    if not questions:
        raise InputError("there is no question", hint="ask at least one")
    if len(questions) > MAX_QUESTIONS:
        raise InputError(
            f"questions: need at most {MAX_QUESTIONS}, have {len(questions)}",
            hint="use ollm batch for more",
        )
    for number, question in enumerate(questions, start=1):
        if not question.strip():
            raise InputError(f"question {number} is empty")
    return encoder.of_texts([joined(document, question) for question in questions])


def check_length(prompts: Sequence[Sequence[int]], max_positions: int | None) -> None:
    """Raises InputError for a document past the model's positions."""
    longest = max(map(len, prompts))
    if max_positions is not None and longest > max_positions:
        raise InputError(
            f"the document and a question have {longest} tokens, the model has "
            f"{max_positions} positions",
            hint="shorten the document, or let it be read in parts with map_reduce (--map-reduce)",
        )


def cut_document(
    document: str, room: int, num_tokens: Callable[[str], int], most_parts: int = 1024
) -> list[str]:
    """The document in parts of at most `room` tokens each, cut between lines where that can be.
    Raises InputError if that is too little for a part, or if there are too many.
    """
    if room < _LEAST_PART:
        raise InputError(
            f"parts of the document: need room for {_LEAST_PART} tokens beside the question and "
            f"the answer, have {max(room, 0)}",
            hint="ask shorter questions, or for fewer new tokens",
        )
    parts, rest = [], document
    while rest.strip():
        part = _longest_part(rest, room, num_tokens)
        parts.append(part)
        rest = rest[len(part) :]
        if len(parts) > most_parts:
            raise InputError(
                f"the document has more than {most_parts} parts of {room} tokens",
                hint="use a model with more positions",
            )
    return parts


def _longest_part(text: str, room: int, num_tokens: Callable[[str], int]) -> str:
    """The longest beginning with at most `room` tokens, up to the end of a line in its last half
    if there is one.
    """
    low, high = 1, min(len(text), 64 * room)
    part = text[:high]
    if num_tokens(part) <= room:
        if high == len(text):
            return part
        low = high
    while high - low > max(low // 64, 1):
        middle = (low + high) // 2
        if num_tokens(text[:middle]) <= room:
            low = middle
        else:
            high = middle
    end = text.rfind("\n", low // 2, low) + 1
    return text[: end or low]


def part_texts(parts: Sequence[str]) -> list[str]:
    """Each part with its number before it, so that the model knows what it reads."""
    total = len(parts)
    return [
        joined(_PART.format(number=number, total=total), part)
        for number, part in enumerate(parts, start=1)
    ]


def part_question(question: str) -> str:
    """The question as it is asked of a part."""
    return joined(question, _NOTHING)


def combining(question: str, answers: Sequence[str]) -> str:
    """What is asked in the end of the answers from all parts."""
    listed = (f"Part {number}: {answer.strip()}" for number, answer in enumerate(answers, start=1))
    return joined(_COMBINE, *listed, question)
