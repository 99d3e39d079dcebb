"""The chat template of a checkpoint: finds it, and renders messages with it.

A template is a program that somebody else wrote. transformers runs it in a sandbox that keeps it
from files and from Python, but not from memory and time. Here it runs in a process of its own that
the kernel bounds; see `template_process`. That costs 60 ms, once per prompt.
"""

from __future__ import annotations

import importlib.util
import json
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

from ollm_core.errors import ConfigError, OllmError
from ollm_core.files.untrusted_json import parse_object, show
from ollm_core.text import template_process

Message = Mapping[str, Any]
"""`role` and `content`, which are texts; `tool_calls` and what else a template knows of one."""
Tool = Mapping[str, Any]
"""A function that the model may call, in OpenAI's form."""

_TEMPLATE_FILE = "chat_template.jinja"
_WITHOUT = "--raw continues the text without a chat template"


@dataclass(frozen=True, slots=True)
class Limits:
    """What rendering may take, beside what grows with the request.

    A template that needs a thousandth of these is a large one.
    """

    memory_bytes: int = 512 << 20
    cpu_seconds: int = 10
    seconds: float = 120.0
    """By the clock, on however busy a machine."""
    num_chars: int = 1 << 20
    """Characters of a rendering."""


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A template in jinja2's language, and the file that it is from."""

    source: str
    where: str
    variables: Mapping[str, str]
    """What it finds beside messages: the special tokens by name."""

    @classmethod
    def of(cls, tokenizer: Any, *, for_tools: bool = False) -> ChatTemplate | None:
        """The one for plain chat, or None if the checkpoint has none; `for_tools`: the one for
        chats with functions, if there are several. Raises ConfigError if it is not text, or if
        there are several and none is the default.
        """
        directory = Path(str(tokenizer.name_or_path))
        file = directory / _TEMPLATE_FILE
        where = str(file) if file.is_file() else f"{directory / 'tokenizer_config.json'}"
        source: object = tokenizer.chat_template
        if isinstance(source, dict):
            names = ", ".join(show(name) for name in sorted(map(str, source)))
            if "default" not in source:
                raise ConfigError(
                    f"{where}: need a chat template named 'default', have {names}", hint=_WITHOUT
                )
            source = source.get("tool_use" if for_tools else "default", source["default"])
        if not source:
            return None
        if not isinstance(source, str):
            raise ConfigError(
                f"{where}: the chat template must be text, got {show(source)}", hint=_WITHOUT
            )
        special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
        return cls(source, where, special)

    def knows(self, name: str) -> bool:
        """Whether it speaks of a variable or a field of this name, as far as its text tells."""
        return re.search(rf"\b{re.escape(name)}\b", self.source) is not None

    def render(
        self,
        conversations: Sequence[Sequence[Message]],
        options: Mapping[str, Any] | None = None,
        limits: Limits | None = None,
        tools: Sequence[Sequence[Tool]] | None = None,
    ) -> list[str]:
        """The text of each conversation, up to where the assistant speaks. `options` are variables
        that some templates know; `tools` are the functions of each conversation.

        Raises ConfigError, with the template's own words, if it refuses them, is damaged, or takes
        more than `limits`.
        """
        known = {**self.variables, **(options or {}), "documents": None}
        renderings = [
            {
                **known,
                "tools": [*given] or None,
                "messages": list(map(dict, messages)),
                "add_generation_prompt": True,
            }
            for messages, given in zip(conversations, tools or repeat(()), strict=False)
        ]
        request = json.dumps({"template": self.source, "renderings": renderings}).encode()
        answer = self._run(request, limits or Limits())
        if "refused" in answer:
            raise self._error(answer["refused"])
        texts: list[str] = answer["texts"]
        for text in texts:
            try:
                text.encode()
            except UnicodeEncodeError:
                raise self._error("what it writes is not Unicode text") from None
        return texts

    def _run(self, request: bytes, limits: Limits) -> dict[str, Any]:
        arguments = (
            limits.memory_bytes + 64 * len(request),
            limits.cpu_seconds + len(request) // 10_000_000,
            limits.num_chars + 8 * len(request),
            *_directories("jinja2", "markupsafe"),
        )
        program = [sys.executable, "-I", "-S", template_process.__file__, *map(str, arguments)]
        try:
            done = subprocess.run(
                program, input=request, capture_output=True, timeout=limits.seconds, check=False
            )
        except subprocess.TimeoutExpired:
            raise self._error(f"it takes more than {limits.seconds:g} s") from None
        except OSError as error:
            reason = f"cannot start {sys.executable}: {error.strerror}"
            raise OllmError(f"{self.where}: {reason}") from error
        if done.returncode == -signal.SIGXCPU:
            raise self._error(f"it takes more than {limits.cpu_seconds} s of processor time")
        if done.returncode:
            last = (done.stderr.decode(errors="replace").strip().splitlines() or [""])[-1]
            raise self._error(f"rendering it ended with code {done.returncode} {last}".strip())
        return parse_object(done.stdout)

    def _error(self, reason: str) -> ConfigError:
        return ConfigError(
            f"{self.where}: the chat template cannot be used: {reason}", hint=_WITHOUT
        )


def _directories(*packages: str) -> list[str]:
    """Where the packages are installed."""
    found = [importlib.util.find_spec(package) for package in packages]
    return list({str(Path(spec.origin).parents[1]): None for spec in found if spec and spec.origin})
