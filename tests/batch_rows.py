"""Rows of a batch, and a model without weights that answers each with a text of its own."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ollm_core.serving.request import Counts, Failed, Finished, NewToken


def row(name: Any, prompt: Any = (5, 6), url: str = "/v1/completions", **body: Any) -> dict:
    """A row for a completion, of token ids."""
    body = {"prompt": list(prompt) if isinstance(prompt, tuple) else prompt, **body}
    return {"custom_id": name, "method": "POST", "url": url, "body": body}


def chat(name: str, *texts: str, **body: Any) -> dict:
    """A row for a chat, the user's turn first."""
    roles = ("user", "assistant")
    messages = [{"role": roles[number % 2], "content": text} for number, text in enumerate(texts)]
    url = "/v1/chat/completions"
    return {"custom_id": name, "method": "POST", "url": url, "body": {"messages": messages, **body}}


def write_rows(path: Path, rows: list[Any]) -> Path:
    """A file of rows; text is a line as it is."""
    lines = (one if isinstance(one, str) else json.dumps(one) for one in rows)
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def read_lines(path: Path) -> list[dict]:
    """The objects of a file, [] where there is none."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def texts(path: Path) -> dict[str, str]:
    """The first text of each answer, by custom_id. No id may be there twice."""
    answers = read_lines(path)
    found = {}
    for one in answers:
        (first, *_) = one["response"]["body"]["choices"]
        found[one["custom_id"]] = first["text"] if "text" in first else first["message"]["content"]
    assert len(found) == len(answers)
    return found


class Tokenizer:
    """Knows ids alone."""

    name_or_path = ""
    chat_template = None

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [1] * len(text)}

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(f" {number}" for number in ids)


class InstantScheduler:
    """Ends requests in an order of chance, some at a step. The text of an answer is the sum of its
    prompt, so that answers are not mistaken for each other.
    """

    def __init__(self, model: InstantModel) -> None:
        self._model = model
        self._live: dict[str, Any] = {}

    def add(self, request: Any) -> None:
        self._live[request.request_id] = request
        self._model.most_live = max(self._model.most_live, len(self._live))

    def step(self) -> list[Any]:
        chance = self._model.chance
        events: list[Any] = []
        for name in chance.sample(sorted(self._live), chance.randint(1, min(4, len(self._live)))):
            request = self._live.pop(name)
            self._model.num_asked += 1
            for index in range(request.wanted.n):
                if error := self._model.fails(request):
                    events.append(Failed(name, index, error))
                    continue
                events.append(NewToken(name, index, 7, str(sum(request.token_ids))))
                events.append(Finished(name, index, "stop", "", Counts()))
        return events

    def __enter__(self) -> InstantScheduler:
        return self

    def __exit__(self, *_: object) -> None:
        self._live.clear()


class InstantModel:
    """What a batch needs of a model."""

    def __init__(self, seed: int = 0, fails: Any = lambda request: None) -> None:
        self.chance = random.Random(seed)
        self.fails = fails
        self.most_live = 0
        self.num_asked = 0
        self.served = SimpleNamespace(
            tokenizer=Tokenizer(), max_positions=100, check=lambda request: None
        )

    def open_scheduler(self, num_tokens: int = 0) -> InstantScheduler:
        return InstantScheduler(self)
