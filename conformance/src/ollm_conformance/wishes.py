"""What a request may ask for: values of every field of SamplingParams, Score, Choices and Request,
edges among them, dealt at random.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from ollm_core.testing import Choices, Request, SamplingParams, Score

MANY = 10_000
"""More than there are tokens in a tiny vocabulary."""
SEED = 11
"""That of requests which differ in one other thing."""
_SPECIAL = range(5, 13)
_PARTS = (1, 2, 40, 63, 64, 65, 100, 128, 130)
"""Tokens of a document that a prompt begins with: around the parts in which prompts are read."""


@dataclass(frozen=True, slots=True)
class Words:
    """The tokenizer of a tiny model: token `n` is `<n>`, and some are special."""

    vocab_size: int

    def of(self, token_id: int, wanted: SamplingParams) -> str:
        """What an answer has of a token."""
        hidden = token_id in _SPECIAL and token_id not in wanted.shown_token_ids
        return "" if hidden else f"<{token_id}>"

    def tokenizer(self) -> Any:
        """As transformers has it."""
        words = {f"<{number}>": number for number in range(self.vocab_size)}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="<0>"))
        tokenizer.decoder = decoders.Fuse()
        tokenizer.add_special_tokens([AddedToken(f"<{one}>", special=True) for one in _SPECIAL])
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def second(token_ids: Sequence[int], logits: Tensor) -> int:
    """A sampling function of a user's: the second likeliest token."""
    return int(logits.topk(2).indices[1])


def prefers(every: int, by: float, token_ids: Tensor, logits: Tensor) -> Tensor:
    """A logits processor of a user's: some tokens are likelier than the model finds them."""
    raised = logits.clone()
    raised[:, ::every] += by
    return raised


def doubles(token_ids: Tensor, logits: Tensor) -> Tensor:
    """Another one, which before that does something else than after it."""
    return logits * 2


def sampling_values(vocab_size: int, draw: random.Random) -> Mapping[str, Sequence[Any]]:
    """Values of each field of SamplingParams: 0, none, one and more than there is among them."""
    ids = range(5, vocab_size)
    liked = functools.partial(prefers, 3, 2.5)
    return {
        "n": (1, 1, 2, 3),
        "temperature": (0, 0, 0.6, 1.0, 2.5),
        "top_k": (0, 1, 3, -1, MANY),
        "top_p": (1.0, 0.5, 0.01),
        "min_p": (0.0, 0.2, 1.0),
        "repetition_penalty": (1.0, 1.3, 0.8),
        "max_tokens": (1, 6, 9),
        "min_tokens": (0, 0, 1, 4),
        "stop": ((), "><1", (">", "<"), ("77>", "<9", "9>"), ("1><2", "><")),
        "stop_token_ids": ((), draw.sample(ids, 1), draw.sample(ids, 40)),
        "ignore_eos": (False, True),
        "include_stop_str_in_output": (False, True),
        "shown_token_ids": ((), [*_SPECIAL][::2]),
        "seed": (0, 7, -3, None),
        "logprobs": (None, 0, 3, MANY),
        "prompt_logprobs": (None, None, 0, 3),
        "logits_processors": ((), (), (liked, doubles), (doubles, liked)),
        "choose": (None, None, None, second),
    }


def request_values() -> Mapping[str, Sequence[Any]]:
    """Values of the fields of Request that say nothing of the text."""
    return {"priority": (0, 0, 1, -1), "keep": (True, False)}


def requests(vocab_size: int, documents: Sequence[Tensor], draw: random.Random) -> list[Request]:
    """Some with each value of each field, whatever others they have; prompts begin like others."""
    wanted: list[Any] = []
    for fields in _dealt(sampling_values(vocab_size, draw), draw):
        fields["min_tokens"] = min(fields["min_tokens"], fields["max_tokens"])
        if fields["min_tokens"]:  # what a stop text says before that is told otherwise by others
            fields["stop"] = ()
        wanted.append(SamplingParams(**fields))
    prompts = [_prompt(vocab_size, documents, draw) for _ in wanted]
    for num_tokens, top in ((1, 0), (7, 3), (None, MANY)):
        prompt = _prompt(vocab_size, documents, draw, least=9)
        wanted.append(Score(num_tokens or len(prompt) - 1, top))
        prompts.append(prompt)
    ids = draw.choices(range(vocab_size), k=20)
    wanted.append(Choices((*ids, ids[0])))
    prompts.append(_prompt(vocab_size, documents, draw))
    beside = _dealt(request_values(), draw, len(wanted))
    order = draw.sample(range(len(wanted)), len(wanted))
    return [Request(token_ids=prompts[i], wanted=wanted[i], **beside[i]) for i in order]


def single_requests(vocab_size: int, draw: random.Random) -> list[Request]:
    """One with each value of each field of SamplingParams, and nothing else that it could hide
    behind: any token is likely.
    """
    found = []
    for name, values in sampling_values(vocab_size, draw).items():
        for number, value in enumerate(values):
            if value in values[:number]:
                continue
            fields = {"temperature": 2.5, "seed": SEED, "max_tokens": 5, "ignore_eos": True}
            prompt = [draw.randrange(13, vocab_size) for _ in range(3)]
            wanted = SamplingParams(**(fields | {name: value}))
            found.append(Request(token_ids=prompt, wanted=wanted, keep=False))
    return found


def checkpoint_values(vocab_size: int, draw: random.Random) -> Mapping[str, Sequence[Any]]:
    """Values of what generation_config.json says of the tokens of any answer, each such that most
    answers are other ones by it.
    """
    ids = range(13, vocab_size)
    most = sorted(draw.sample(ids, len(ids) * 2 // 3))
    return {
        "repetition_penalty": (4.0, 0.3),
        "no_repeat_ngram_size": (1,),
        "bad_words_ids": ([*([one] for one in most[1:]), [most[0], most[1]]],),
        "suppress_tokens": (most,),
        "begin_suppress_tokens": (most,),
    }


def ruled_requests(vocab_size: int, draw: random.Random) -> list[Request]:
    """A greedy one, one by chance, and one with a penalty of its own, after a prompt that has a
    third of all tokens.
    """
    prompt = draw.sample(range(13, vocab_size), (vocab_size - 13) // 3)
    greedy = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    chance = replace(greedy, temperature=2.5, seed=SEED)
    wanted = (greedy, chance, replace(greedy, repetition_penalty=1.3))
    return [Request(token_ids=prompt, wanted=one, keep=False) for one in wanted]


def _dealt(
    values: Mapping[str, Sequence[Any]], draw: random.Random, number: int = 0
) -> list[dict[str, Any]]:
    """Hands of a value for each name, so many or as few as have all values."""
    number = number or 2 * max(map(len, values.values()))
    hands: list[dict[str, Any]] = [{} for _ in range(number)]
    for name, choices in values.items():
        deck = [choices[i % len(choices)] for i in range(number)]
        draw.shuffle(deck)
        for hand, one in zip(hands, deck, strict=True):
            hand[name] = one
    return hands


def _prompt(
    vocab_size: int, documents: Sequence[Tensor], draw: random.Random, least: int = 1
) -> list[int]:
    begun = draw.choice(documents)[: draw.choice((0, *_PARTS))].tolist()
    own = torch.randint(
        5, vocab_size, (max(draw.choice((0, 1, 3, 70)), least - len(begun)),),
        generator=torch.Generator().manual_seed(draw.randrange(1 << 30)),
    )  # fmt: skip
    return [*begun, *own.tolist()]
