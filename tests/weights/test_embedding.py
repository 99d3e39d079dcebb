"""Rows of the embedding table."""

from __future__ import annotations

import torch

from ollm_core.weights.embedding import EmbeddingRows


def test_each_embedding_row_is_read_once(saved):
    """Repeated token ids cost one read."""
    tensors, checkpoint = saved
    with EmbeddingRows(checkpoint.tensors["t2"]) as rows:
        ids = torch.tensor([5, 0, 5, 110])
        assert torch.equal(rows.lookup(ids, torch.float32), tensors["t2"][ids])
        assert rows.bytes_read == 3 * 129 * 4
