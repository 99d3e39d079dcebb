"""Products of states with weights in half precision, summed in float32, on a processor. The weights
stay as small as they are stored.

Letters: R rows, the tokens of a call; K numbers of a state; N outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ollm_core.device.buffers import aligned_buffer
from ollm_core.products.small_batch import MOST_ROWS, SmallBatch
from ollm_core.products.weight import ProductWeight

TILE_BYTES = 8 << 20
"""Of weights that are widened together at most: a part of what a processor's cache holds."""
TILE_OUTPUTS = 512
"""Outputs of a tile at most: with more a product is no faster."""

_FEWEST_ROWS = 4  # for fewer, without a compiled kernel, torch's own product is as fast
_MANY_ROWS = 256  # from here on the states are the left factor: that is the faster one when large
_WHOLE = 16  # outputs that a float32 product takes together


class CpuProducts:
    """How the products of one model run, by their rows. On a processor without instructions for
    them:

    - one row: torch's own, which is bound by memory;
    - up to MOST_ROWS: a compiled kernel, if there is one;
    - more: tiles of the weights, widened into one buffer that is used again and again, and float32
      products with them.

    With instructions one row is the compiled kernel's, because torch's is not bound by memory
    there, and more are torch's own.
    """

    def __init__(
        self, dtype: torch.dtype, small_batch: SmallBatch | None, *, instructions: bool = False
    ) -> None:
        self.dtype = dtype
        self.small_batch = small_batch
        self.buffer_bytes = 0 if instructions else TILE_BYTES
        """Of the buffer for tiles, which stays until `close`."""
        self._instructions = instructions
        fewest, most = (1, 1) if instructions else (2, MOST_ROWS)
        self._compiled = range(fewest, most + 1) if small_batch else range(0)
        """Rows for which the compiled kernel is taken."""
        self._buffer: Tensor | None = None
        self._traced = torch.empty(TILE_BYTES // 4, dtype=torch.float32, device="meta")

    def expect(self, longest_row: int) -> None:
        """Before any product: no matrix will have longer rows, so that the buffer need not hold
        more than a tile of those.
        """
        if not self._instructions:
            self.buffer_bytes = min(TILE_BYTES, 4 * TILE_OUTPUTS * longest_row)

    def bind(self, parameters: Sequence[Tensor], rows: int) -> Sequence[Tensor]:
        """`parameters`, the matrices among them multiplied by `linear` and `matmul` where they meet
        up to `rows` rows.
        """
        if (rows > 1) == self._instructions:  # torch's own
            return parameters
        return [self.weight(one) if one.dim() == 2 else one for one in parameters]

    def weight(self, matrix: Tensor) -> Tensor:
        """A matrix, of which products are as here; itself in another dtype."""
        return ProductWeight.of(matrix, self) if matrix.dtype == self.dtype else matrix

    def linear(self, states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """`states` [..., K] times `weight` [N, K] transposed, plus `bias` [N] -> [..., N]."""
        if states.dtype != self.dtype:
            return functional.linear(states, weight, bias)
        rows = states.numel() // max(states.shape[-1], 1)
        compiled = rows in self._compiled
        if weight.stride(1) != 1:
            if weight.stride(0) != 1 or self._instructions:
                return functional.linear(states, weight, bias)
            return self._with_rows_in_place(states, weight.t(), bias)
        torchs = self._instructions or rows < _FEWEST_ROWS
        if (torchs and not compiled) or not weight.numel():
            return functional.linear(states, weight, bias)
        output = states.new_empty(*states.shape[:-1], weight.shape[0])
        flat = states.reshape(rows, -1).float()  # [R, K]
        out = output.view(rows, -1)
        if compiled:
            if not flat.is_meta:
                assert self.small_batch is not None, "just looked at"
                self.small_batch(flat, weight, bias, out)
            return output
        step = self._tile(weight.shape[1])
        part = flat.new_empty(rows * min(step, len(weight)))
        for first in range(0, len(weight), step):
            tile = self._widened(weight[first : first + step])
            if rows < _MANY_ROWS:
                sums = part[: rows * len(tile)].view(len(tile), rows)
                sums = torch.mm(tile, flat.t(), out=sums).t()
            else:
                sums = part[: rows * len(tile)].view(rows, len(tile))
                torch.mm(flat, tile.t(), out=sums)
            if bias is not None:
                sums += bias[first : first + step]
            out[:, first : first + step] = sums
        return output

    def matmul(self, states: Tensor, weight: Tensor) -> Tensor:
        """`states` [..., K] times `weight` [K, N] -> [..., N]."""
        return self.linear(states, weight.t())

    def _with_rows_in_place(self, states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """`states` [..., K] times `weight` [K, N], whose rows are in one piece each: the product is
        summed up over tiles of them.
        """
        output = states.new_empty(*states.shape[:-1], weight.shape[1])
        flat = states.reshape(-1, len(weight)).float()
        sums = flat.new_zeros(len(flat), weight.shape[1])
        if bias is not None:
            sums += bias
        step = self._tile(weight.shape[1])
        for first in range(0, len(weight), step):
            sums.addmm_(flat[:, first : first + step], self._widened(weight[first : first + step]))
        output.view(len(flat), -1).copy_(sums)
        return output

    def scratch_bytes(self, rows: int, size: int) -> int:
        """The most that `linear` holds beside its output and the buffer: R states of K = `size` in
        float32, and their products with one tile.
        """
        if rows in self._compiled:
            return rows * size * 4
        return rows * (size + self._tile(size)) * 4 if rows > 1 and self.buffer_bytes else 0

    def _tile(self, size: int) -> int:
        """Rows of a tile, of so many weights each."""
        fit = min(self.buffer_bytes // 4 // size, TILE_OUTPUTS)
        return max(fit // _WHOLE * _WHOLE, min(fit, _WHOLE), 1)

    def _widened(self, rows: Tensor) -> Tensor:
        """Some rows of a matrix in float32, until the next call."""
        if 4 * rows.numel() > self.buffer_bytes:  # one row that is longer than a tile
            return rows.float()
        if rows.is_meta:
            return self._traced[: rows.numel()].view(rows.shape).copy_(rows)
        if self._buffer is None:
            with torch.inference_mode(mode=False):
                self._buffer = aligned_buffer(self.buffer_bytes).view(torch.float32)
        return self._buffer[: rows.numel()].view(rows.shape).copy_(rows)

    def close(self) -> None:
        """Give the buffer back."""
        self._buffer = None
