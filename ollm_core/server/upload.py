"""A file that a client sends, as multipart/form-data: written as it comes, never held."""

from __future__ import annotations

from typing import Any, BinaryIO

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from ollm_core.server.errors import RefusedRequestError

_MAX_PARTS = 16
_MAX_FIELD_BYTES = 4096
MAX_NAME_CHARS = 200


class Upload:
    """Takes the parts of a body. `fields` are the short ones, `name` is the file's own."""

    def __init__(self, content_type: bytes, file: BinaryIO) -> None:
        """The part called "file" is written to `file`. Raises RefusedRequestError for another type
        of body.
        """
        kind, options = parse_options_header(content_type)
        boundary = options.get(b"boundary", b"")
        if kind != b"multipart/form-data" or not boundary:
            raise _refused("need multipart/form-data")
        self.fields: dict[str, bytes] = {}
        self.name: str | None = None
        self.size = 0
        self.is_whole = False
        self._file = file
        self._num_parts = 0
        self._part = ""
        self._header, self._value = b"", b""
        callbacks: Any = {
            "on_part_begin": self._begin,
            "on_header_field": self._on_header,
            "on_header_value": self._on_value,
            "on_header_end": self._on_header_end,
            "on_part_data": self._on_data,
            "on_end": self._on_end,
        }
        self._parser = MultipartParser(boundary, callbacks)

    def take(self, data: bytes) -> None:
        """The next part of the body. Raises RefusedRequestError."""
        try:
            self._parser.write(data)
        except FormParserError:
            raise _refused("is no multipart/form-data") from None

    def finish(self) -> None:
        """Raises RefusedRequestError if something is missing."""
        if not self.is_whole or self.name is None:
            raise _refused("need a part called file")

    def _begin(self) -> None:
        self._num_parts += 1
        self._part = ""
        if self._num_parts > _MAX_PARTS:
            raise _refused(f"need at most {_MAX_PARTS} parts")

    def _on_header(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _on_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _on_header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            _, options = parse_options_header(self._value)
            self._part = options.get(b"name", b"").decode("utf-8", "replace")[:MAX_NAME_CHARS]
            if self._part == "file":
                if self.name is not None:
                    raise _refused("need one file")
                name = options.get(b"filename", b"").decode("utf-8", "replace")
                self.name = "".join(filter(str.isprintable, name))[:MAX_NAME_CHARS]
            elif self._part in self.fields:
                raise _refused("has a part twice")
            else:
                self.fields[self._part] = b""
        self._header, self._value = b"", b""

    def _on_data(self, data: bytes, start: int, end: int) -> None:
        if self._part == "file":
            self.size += end - start
            self._file.write(data[start:end])
        elif self._part in self.fields:
            self.fields[self._part] += data[start:end]
            if len(self.fields[self._part]) > _MAX_FIELD_BYTES:
                raise _refused(f"need fields of at most {_MAX_FIELD_BYTES} bytes")
        else:
            raise _refused("has a part without a name")

    def _on_end(self) -> None:
        self.is_whole = True


def _refused(reason: str) -> RefusedRequestError:
    return RefusedRequestError(400, f"the body: {reason}", code="invalid_form")
