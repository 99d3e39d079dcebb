"""Checks of where generation stops: several stop tokens, those of the checkpoint, and a stop inside
a draft.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from ollm_conformance.adapter.base import AdapterSuite
from ollm_conformance.checks import check
from ollm_conformance.compare import same_tokens, same_within
from ollm_conformance.held import same_lengths
from ollm_conformance.subject import Subject, generate, left_padded
from ollm_core.generation import StreamedModel

_NUM_NEW = 12
_PROMPT = 50


class Stops(AdapterSuite):
    """A text ends where it must, and what is remembered ends there too."""

    @check(
        "language.stop-list",
        "Of several end-of-sequence tokens the first that is generated ends a text, in whatever "
        "order they are listed, and each row of a batch ends by its own.",
        look="generation_config.json of the checkpoint; text_config() must keep eos_token_id",
    )
    def test_stop_list(self, subject: Subject) -> None:
        prompt = subject.prompt(_PROMPT)
        tokens = subject.reference().greedy(prompt, _NUM_NEW)[0]
        early, late = _two_stops(tokens)
        with subject.open() as model:
            for stops in ([tokens[early], tokens[late]], [tokens[late], tokens[early]]):
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
        prompts = [subject.prompt(n, seed=seed) for n, seed in ((_PROMPT, 0), (17, 1))]
        rows = [subject.reference().greedy(prompt, _NUM_NEW)[0] for prompt in prompts]
        early, _ = _two_stops(rows[0])
        _, late = _two_stops(rows[1])
        stops = {rows[0][early], rows[1][late]}
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
        prompt = subject.prompt(_PROMPT)
        tokens = subject.reference().greedy(prompt, _NUM_NEW)[0]
        early, late = _two_stops(tokens)
        directory = subject.copy(subject.tiny())
        said = directory / "generation_config.json"
        for stops in ([tokens[late], tokens[early]], tokens[late]):
            said.write_text(json.dumps({"eos_token_id": stops}))
            last = early if isinstance(stops, list) else late
            found = _as_the_checkpoint_says(subject, directory, prompt)
            same_tokens(found, tokens[: last + 1], f"tokens with {stops} in {said.name}")
        said.unlink()
        config = directory / "config.json"
        told = json.loads(config.read_text())
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
        prompt, second = subject.prompt(_PROMPT), subject.prompt(9, seed=1)
        tokens = subject.reference().greedy(prompt, _NUM_NEW)[0]
        early, late = _two_stops(tokens)
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
            early, _ = _two_stops(tokens)
            _ends(
                model, subject, looked_up, second, tokens[: early + 1], _NUM_NEW, tokens[early],
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
    text = torch.cat([found[0], second])
    logits = model(input_ids=text[None, length:], past_key_values=cache).logits[0]
    wanted = subject.reference().run(text)[length:]
    same_within(logits, wanted, 1e-4, f"logits of a second turn after {what}")
    cache.close()


def _two_stops(tokens: list[int]) -> tuple[int, int]:
    """Where two tokens of a text are that have not come before, the first past its start."""
    new = [i for i in range(2, len(tokens)) if tokens[i] not in tokens[:i]]
    return new[len(new) // 3], new[2 * len(new) // 3]


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
