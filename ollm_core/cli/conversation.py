"""What is said in a chat, and what its commands do. Nothing of it is kept on disk, but by /save."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from ollm_core.cli.inputs import read_text
from ollm_core.errors import InputError, OllmError
from ollm_core.files.paths import absolute
from ollm_core.files.scratch import replace_file

HELP = """\
/file PATH      a document that your next message is about; several may be given
/system TEXT    what the model is told before everything; without TEXT, nothing
/save PATH      write the conversation: as Markdown if PATH ends in .md, else as JSON
/clear          begin anew
/help           this
/bye            end, as Ctrl-D does
\"\"\"             begins and ends a message of several lines
Ctrl-C stops an answer, and not the chat."""

_ENDS = ("/bye", "/exit", "/quit")


class Conversation:
    """Messages of both sides, and documents that wait for the next one."""

    def __init__(self, system: str | None = None, *, as_text: bool = False) -> None:
        self.has_ended = False
        self._system = system
        self._as_text = as_text
        self._turns: list[dict[str, str]] = []
        self._documents: list[str] = []

    @property
    def messages(self) -> list[dict[str, str]]:
        """All that a chat template is to show."""
        before = [{"role": "system", "content": self._system}] if self._system else []
        return [*before, *self._turns]

    def attach(self, file: Path) -> str:
        """Let the next message be about a document, too; -> what to tell. Raises InputError."""
        text = read_text(file, as_text=self._as_text)
        self._documents.append(f"# {file.name}\n\n{text}")
        return f"{file.name}: {len(text):,} characters, for your next message"

    def say(self, text: str) -> None:
        """The user's next message."""
        content = "\n\n".join([*self._documents, text])
        self._turns.append({"role": "user", "content": content})

    def answered(self, text: str) -> None:
        """The model's answer to it, as far as it came."""
        self._turns.append({"role": "assistant", "content": text})
        self._documents.clear()

    def take_back(self) -> None:
        """The last message could not be answered; its documents wait for the next one."""
        self._turns.pop()

    def command(self, line: str) -> str:
        """Do what a line that begins with / says; -> what to tell. Raises InputError, OllmError."""
        name, _, rest = line.strip().partition(" ")
        rest = rest.strip()
        if name in _ENDS:
            self.has_ended = True
            return ""
        known: dict[str, Callable[[str], str]] = {
            "/file": self._file,
            "/system": self._set_system,
            "/save": self._save,
            "/clear": self._clear,
            "/help": lambda _: HELP,
            "/?": lambda _: HELP,
        }
        if name not in known:
            raise InputError(f"there is no command {name}", hint="/help lists them")
        return known[name](rest)

    def _file(self, name: str) -> str:
        if not name:
            raise InputError("/file: need a path, have none")
        return self.attach(absolute(name))

    def _set_system(self, text: str) -> str:
        self._system = text or None
        return "the system message is set" if text else "there is no system message"

    def _clear(self, _: str) -> str:
        self._turns.clear()
        self._documents.clear()
        return "the conversation begins anew"

    def _save(self, name: str) -> str:
        if not name:
            raise InputError("/save: need a path, have none")
        path = absolute(name)
        if path.exists():
            raise InputError(f"{path} is there already", hint="name another file")
        is_markdown = path.suffix == ".md"
        content = _markdown(self.messages) if is_markdown else _json(self.messages)
        try:
            replace_file(path, content.encode())
        except OSError as error:
            raise OllmError(f"cannot write to {path}: {error.strerror}") from error
        return f"saved in {path}"


def _json(messages: Sequence[dict[str, str]]) -> str:
    return json.dumps({"messages": messages}, ensure_ascii=False, indent=1) + "\n"


def _markdown(messages: Sequence[dict[str, str]]) -> str:
    return "\n".join(f"## {one['role']}\n\n{one['content'].strip()}\n" for one in messages)
