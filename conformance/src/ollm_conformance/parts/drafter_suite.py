"""How a draft source is handed over to its suite."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

from ollm_conformance.parts.base import PartSuite
from ollm_conformance.parts.texts import OpenDrafter, closing
from ollm_core import Drafter, DraftRequest, MemoryAccount

LIMIT = 1 << 30
MOST = 10
"""The most tokens that core asks for by itself."""


class DrafterSuite(PartSuite):
    """How a source is made; `DrafterConformance` has the checks."""

    vocab_size: ClassVar[int] = 199
    """Of the model that is drafted for."""
    longest: ClassVar[int] = 400
    """Tokens of the longest text that a source with memory for it is told of."""
    learns: ClassVar[bool] = False
    """Whether it may draft from what it was asked before, about other texts too: the same question
    then need not have the same answer.
    """

    @classmethod
    def open_drafter(cls, request: DraftRequest) -> Drafter:
        """A new source, as the factory of the hook `ollm_draft_sources` makes it.

        `request.directory` is a temporary directory with no checkpoint in it, and there is no
        tokenizer. What the source holds is reserved in the accounts of the request.
        """
        raise NotImplementedError

    @classmethod
    @contextmanager
    def opened(cls, num_tokens: int | None = None) -> Iterator[OpenDrafter]:
        """A source that was told of a text of `num_tokens` (default: the longest); it is closed
        afterwards, if it can be.
        """
        with tempfile.TemporaryDirectory() as name, closing(cls.open(Path(name))) as opened:
            opened.begin(cls.longest if num_tokens is None else num_tokens)
            yield opened

    @classmethod
    def open(cls, directory: Path, limit: int = LIMIT) -> OpenDrafter:
        """A source in accounts of its own."""
        config = {"model_type": "llama", "vocab_size": cls.vocab_size}
        device, host = MemoryAccount("device memory", limit), MemoryAccount("host memory", limit)
        request = DraftRequest(config, directory, cls.vocab_size, None, "cpu", device, host)
        return OpenDrafter(cls.open_drafter(request), request)
