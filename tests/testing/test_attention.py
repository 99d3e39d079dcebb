"""What attention is given and gives, seen in a tiny Llama."""

from __future__ import annotations

import torch

import ollm
from ollm_core.testing import attended_tokens


def test_attended_tokens_are_those_that_layers_computed_with(tiny):
    """The last token of each call, with all keys up to its own; and a pass computes as before."""
    ids = torch.arange(10, 50)[None]
    with ollm.load(tiny, device="cpu", device_memory="1GB", chunk_size=16) as model:
        expected = model(input_ids=ids).logits
        with attended_tokens(model) as tokens:
            found = model(input_ids=ids).logits
        num_layers = model.config.num_hidden_layers
        assert torch.equal(found, expected)
        assert [one.layer_idx for one in tokens] == [i for i in range(num_layers) for _ in range(3)]
        assert [one.keys.shape[1] for one in tokens[:3]] == [16, 32, 40]
        last = tokens[-1]
        group = last.query.shape[0] // last.keys.shape[0]
        keys, values = (one.repeat_interleave(group, dim=0) for one in (last.keys, last.values))
        scores = torch.einsum("hd,hsd->hs", last.query, keys) * last.options["scaling"]
        attended = torch.einsum("hs,hsd->hd", scores.softmax(-1), values)
        torch.testing.assert_close(last.output, attended)
        model(input_ids=ids)
        assert len(tokens) == 3 * num_layers
