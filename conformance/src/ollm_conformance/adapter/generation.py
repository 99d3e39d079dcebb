"""Checks of where generation stops: several stop tokens, those of the checkpoint, and a stop inside
a draft.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ollm_conformance.adapter.base import AdapterSuite
from ollm_conformance.checks import check
from ollm_conformance.compare import same_tokens, same_within
from ollm_conformance.held import same_lengths
from ollm_conformance.subject import Reference, Subject, generate, left_padded
from ollm_core.testing import StreamedModel, parse_object

_NUM_NEW = 12
_PROMPT = 50
_MORE = 3
"""Tokens of a further turn."""


class Stops(AdapterSuite):
    """A text ends where it must, and what is remembered ends there too."""

    @check(
        "language.stop-list",
        "Of several end-of-sequence tokens the first that is generated ends a text, in whatever "
        "order they are listed, and each row of a batch ends by its own.",
        look="generation_config.json of the checkpoint; text_config() must keep eos_token_id",
    )
    def test_stop_list(self, subject: Subject) -> None:
        prompt, tokens, early, late = _text(subject, _PROMPT)
        never = sorted({*range(subject.vocab_size)} - {*tokens})
        listed = [tokens[early], tokens[late], never[0], never[-1]]
        with subject.open() as model:
            for stops in (listed, listed[::-1]):
                found = generate(model, prompt[None], _NUM_NEW, eos_token_id=stops)
                same_tokens(
                    found[0, _PROMPT:].tolist(),
                    tokens[: early + 1],
                    f"tokens up to the first of the stop tokens {stops}",
                )

    @check(
        "language.stop-rows",
        "Rows of a padded batch end each at its own stop token, and the others go on.",
        look="generation_config.json of the checkpoint; text_config() must keep eos_token_id",
        needs=["batch"],
    )
    def test_stop_rows(self, subject: Subject) -> None:
        first, second = _text(subject, _PROMPT), _text(subject, 17, seed=1)
        prompts, rows = [first[0], second[0]], [first[1], second[1]]
        stops = {rows[0][first[2]], rows[1][second[3]]}
        ids, mask = left_padded(prompts)
        with subject.open() as model:
            found = generate(
                model, ids, _NUM_NEW, attention_mask=mask, eos_token_id=sorted(stops)
            )[:, ids.shape[1] :]  # fmt: skip
        ends = [next((i for i, t in enumerate(row) if t in stops), _NUM_NEW - 1) for row in rows]
        for row, (tokens, end) in enumerate(zip(rows, ends, strict=True)):
            expected = tokens[: end + 1] + [0] * (max(ends) - end)  # padded with 0
            same_tokens(found[row].tolist(), expected, f"row {row} with stop tokens {stops}")

    @check(
        "language.stop-config",
        "The stop tokens that generation_config.json of the checkpoint lists end a text without "
        "being asked for, and so does the one of config.json where there is no such file.",
        look="text_config() must keep eos_token_id; the checkpoint's generation_config.json",
    )
    def test_stop_config(self, subject: Subject) -> None:
        prompt, tokens, early, late = _text(subject, _PROMPT)
        directory = subject.copy(subject.tiny())
        said = directory / "generation_config.json"
        for stops in ([tokens[late], tokens[early]], tokens[late]):
            said.write_text(json.dumps({"eos_token_id": stops}))
            last = early if isinstance(stops, list) else late
            found = _as_the_checkpoint_says(subject, directory, prompt)
            same_tokens(found, tokens[: last + 1], f"tokens with {stops} in {said.name}")
        said.unlink()
        config = directory / "config.json"
        told = parse_object(config.read_bytes())
        config.write_text(json.dumps(_with_stop(told, tokens[early])))
        found = _as_the_checkpoint_says(subject, directory, prompt)
        same_tokens(found, tokens[: early + 1], f"tokens with {tokens[early]} in {config.name}")

    @check(
        "drafts.stop",
        "A stop token or the last token that was asked for, inside a draft that is right beyond "
        "it, ends the text there as without a draft; the cache then has what it has without one, "
        "and a second turn goes on from it.",
        look="caches(): what a layer remembers must be cut back to any earlier token",
        needs=["drafts", "truncate"],
    )
    def test_stop_in_draft(self, subject: Subject) -> None:
        prompt, tokens, early, late = _text(subject, _PROMPT)
        second = subject.prompt(9, seed=1)
        with subject.open() as model:
            drafter = _Foresight(_PROMPT, tokens)
            for what, num_new, stops in (
                ("a stop token", _NUM_NEW, tokens[early]),
                ("two stop tokens", _NUM_NEW, [tokens[late], tokens[early]]),
                ("max_new_tokens", early + 1, None),
            ):
                drafter.num_drafted = 0
                model.draft_with(drafter, _NUM_NEW)
                before = model.stats.accepted_tokens
                _ends(model, subject, prompt, second, tokens[: early + 1], num_new, stops, what)
                assert model.stats.accepted_tokens > before, (
                    f"{what}: expected right drafts to be accepted, got none of "
                    f"{drafter.num_drafted} tokens"
                )
            model.draft_with(None)
            looked_up = torch.cat([prompt[:20], torch.tensor(tokens), prompt[20:]])
            tokens = subject.reference().greedy(looked_up, _NUM_NEW)[0]
            stop = max(i for i in range(_NUM_NEW // 2) if tokens[i] not in tokens[:i])
            _ends(
                model, subject, looked_up, second, tokens[: stop + 1], _NUM_NEW, tokens[stop],
                "a stop token with prompt lookup", prompt_lookup_num_tokens=4,
            )  # fmt: skip


class _Foresight:
    """A draft source that knows what a text goes on with."""

    def __init__(self, num_before: int, tokens: list[int]) -> None:
        self._num_before = num_before
        self._tokens = torch.tensor(tokens)
        self.num_drafted = 0

    def __call__(self, token_ids: Tensor, num_tokens: int) -> Tensor:
        draft = self._tokens[len(token_ids) - self._num_before :][:num_tokens]
        self.num_drafted += len(draft)
        return draft


def _ends(
    model: StreamedModel,
    subject: Subject,
    prompt: Tensor,
    second: Tensor,
    expected: list[int],
    num_new: int,
    stops: int | list[int] | None,
    what: str,
    **options: object,
) -> None:
    """The text must be `expected`, the cache must have all of it but the last token, and a second
    prompt on it must give the logits of the whole text.
    """
    cache = model.new_cache()
    found = generate(
        model, prompt[None], num_new, eos_token_id=stops, past_key_values=cache, **options
    )
    same_tokens(found[0, len(prompt) :].tolist(), expected, f"tokens up to {what}")
    length, stored = len(prompt) + len(expected) - 1, cache.get_seq_length()
    assert stored == length, f"after {what}: expected {length} tokens stored, got {stored}"
    same_lengths(cache.store, cache.rows, [length], len(cache), f"after {what}")
    text, rest = torch.cat([found[0], second]), [len(expected) - 1, 1 + len(second)]
    logits = model(input_ids=text[None, length:], past_key_values=cache).logits[0]
    wanted = _in_pieces(subject.reference(), text.split([len(prompt), *rest]))
    same_within(logits, wanted, 1e-4, f"logits of a second turn after {what}")
    third = torch.cat([text, second.flip(0)])
    found = generate(model, third[None], _MORE, past_key_values=cache, **options)
    tokens = subject.reference().greedy(third, _MORE)[0]
    same_tokens(found[0, len(third) :].tolist(), tokens, f"tokens of a third turn after {what}")
    cache.close()


def _in_pieces(reference: Reference, pieces: Sequence[Tensor]) -> Tensor:
    """Logits [t, V] of the last of pieces that come one after the other."""
    cache = reference.new_cache()
    return [reference.run(piece, cache=cache) for piece in pieces if len(piece)][-1]


def _text(subject: Subject, num_tokens: int, seed: int = 0) -> tuple[Tensor, list[int], int, int]:
    """A prompt, its greedy tokens, and where two of these are that have not come before, the first
    past the start. Raises AssertionError if no text of the model has two.
    """
    fewest = 4
    for more in range(0, 240, 10):
        prompt = subject.prompt(num_tokens, seed=seed + more)
        tokens = subject.reference().greedy(prompt, _NUM_NEW)[0]
        new = [i for i in range(2, len(tokens)) if tokens[i] not in tokens[:i]]
        if len(new) >= fewest:
            return prompt, tokens, new[len(new) // 3], new[2 * len(new) // 3]
        if more == 70:
            fewest = 2  # a model that soon repeats itself
    raise AssertionError(
        f"expected a prompt after which the tiny model says other tokens, got {tokens} after the "
        "last of 24"
    )


def _as_the_checkpoint_says(subject: Subject, directory: Path, prompt: Tensor) -> list[int]:
    """Greedy tokens after a prompt, with what the checkpoint says of its end."""
    with subject.open(directory) as model:
        found = model.generate(  # type: ignore[misc]
            prompt[None], max_new_tokens=_NUM_NEW, do_sample=False, pad_token_id=0
        )
    return found[0, len(prompt) :].tolist()


def _with_stop(config: dict[str, object], stop: int) -> dict[str, object]:
    """The config with another end-of-sequence token, where it has its text's fields."""
    text = config.get("text_config")
    if isinstance(text, dict):
        return {**config, "text_config": {**text, "eos_token_id": stop}, "eos_token_id": stop}
    return {**config, "eos_token_id": stop}
