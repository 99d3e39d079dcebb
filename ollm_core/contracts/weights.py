"""The contracts of reading engines, and of the streamer that gives parameters to layers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from ollm_core.contracts.closing import Closing
from ollm_core.contracts.tensors import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor


class ByteSource(Closing):
    """A reading engine: brings byte ranges of checkpoint files into memory that the caller owns."""

    name: str

    @abstractmethod
    def read(self, tensors: Sequence[TensorInfo], buffer: memoryview) -> Sequence[int]:
        """Read all `tensors` into `buffer` and return each one's byte offset in it. What lies at a
        multiple of 64 bytes in its file does so in the buffer.

        An offset equals the tensor's own in its file modulo 64 bytes.
        `buffer` is writable, page-aligned and at least `buffer_bytes(tensors)` long. May be called
        from several threads. Raises ReadError if the storage fails or a file is shorter than it was
        when it was opened.
        """

    @abstractmethod
    def buffer_bytes(self, tensors: Sequence[TensorInfo]) -> int:
        """Bytes of buffer that `read(tensors)` needs."""

    @property
    @abstractmethod
    def bytes_read(self) -> int:
        """Bytes asked of the storage since this source was opened."""

    def take_turns(self, with_others: bool) -> None:
        """Whether others read the same disk from now on, and wait for what they read: then it is
        asked for little at a time, so that they get in between. By default nothing changes.
        """


class WeightStreamer(Closing):
    """Gives out parameters in the order of a weight pass, and reads ahead: after the last unit
    comes the first.
    """

    @abstractmethod
    def acquire(self, unit_idx: int) -> AbstractContextManager[Sequence[Tensor]]:
        """The parameters of one unit (a layer, or a part of the head) on the device, valid inside
        the context.

        Their order is the unit's. Raises ReadError if they cannot be read; the next pass may be
        tried again.
        """

    @abstractmethod
    def experts(
        self, layer_idx: int, expert_ids: Iterable[int]
    ) -> AbstractContextManager[Iterator[tuple[int, Sequence[Tensor]]]]:
        """Routed experts of one layer, each once and in ascending order, with their slices of the
        parameters of the layer's experts module, on the device.

        They are valid until the next step of the iterator. `expert_ids` are counted as
        `collections.Counter` does: a mapping says how many tokens go to each expert, which may
        decide what is kept. Raises ReadError at a step.
        """

    @abstractmethod
    def embed(self, token_ids: Tensor) -> Tensor:
        """Rows of the input embedding, [N] -> [N, C], in the compute dtype on the device: a copy,
        which the caller may change.
        """

    @property
    @abstractmethod
    def bytes_read(self) -> int:
        """Weight bytes read from storage since opening."""
