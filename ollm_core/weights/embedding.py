"""Reads rows of the input embedding one by one: those of a pass's tokens, not the table."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from ollm_core.contracts.closing import Closing
from ollm_core.contracts.tensors import TensorInfo
from ollm_core.device.buffers import as_memoryview
from ollm_core.errors import ReadError
from ollm_core.weights.units import TORCH_DTYPES


class EmbeddingRows(Closing):
    """Looks rows of one 2-D tensor up in its file."""

    def __init__(self, table: TensorInfo) -> None:
        self.bytes_read = 0
        self._table = table
        self._row_bytes = table.num_bytes // table.shape[0]
        self._file = os.open(table.path, os.O_RDONLY | os.O_CLOEXEC)

    def lookup(self, token_ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of `token_ids` [N] as [N, C] in `dtype`, on the CPU. Each distinct row is read
        once. Raises ReadError.
        """
        distinct, where = token_ids.unique(return_inverse=True)
        rows = torch.empty(len(distinct) * self._row_bytes, dtype=torch.uint8)
        memory = as_memoryview(rows)
        for i, row in enumerate(distinct.tolist()):
            part = memory[i * self._row_bytes : (i + 1) * self._row_bytes]
            try:
                count = os.preadv(self._file, [part], self._table.offset + row * self._row_bytes)
            except OSError as error:
                raise ReadError(f"{self._table.path}: reading failed: {error.strerror}") from error
            if count != len(part):
                raise ReadError(
                    f"{self._table.path}: row {row} of {self._table.name} could not be read",
                    hint="the file changed while the model was open",
                )
        self.bytes_read += rows.numel()
        table = rows.view(TORCH_DTYPES[self._table.dtype]).view(len(distinct), -1)
        return table.to(dtype)[where]

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
