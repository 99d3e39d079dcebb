"""A model's own forward, followed: what is taken for granted of it is looked at."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from ollm_core import UnsupportedError
from ollm_core.contracts.model import Layout
from ollm_core.model.follow_forward import follow_forward
from ollm_core.model.own_forward import OwnForward


class Plain(LlamaForCausalLM):
    """A Llama whose forward is here, to be changed."""

    def forward(
        self, input_ids, position_ids=None, past_key_values=None, use_cache=None, return_dict=None
    ):
        hidden = embedded = self.model.embed_tokens(input_ids)
        rotary = self.model.rotary_emb(hidden, position_ids)
        outputs = []
        for i, layer in enumerate(self.called()):
            hidden = layer(
                self.between(i, hidden, embedded),
                past_key_values=past_key_values,
                position_embeddings=self.given(rotary, hidden, embedded),
            )
            outputs.append(hidden)
        logits = self.lm_head(self.model.norm(self.last(outputs)))
        return CausalLMOutputWithPast(logits=logits)

    def called(self):
        return self.model.layers

    def between(self, layer_idx, hidden, embedded):
        return hidden

    def given(self, rotary, hidden, embedded):
        return rotary

    def last(self, outputs):
        return outputs[-1]


class Scaled(Plain):
    def between(self, layer_idx, hidden, embedded):
        return hidden * 2 if layer_idx == 2 else hidden


class Turned(Plain):
    def given(self, rotary, hidden, embedded):
        return rotary[0] + hidden.mean(), rotary[1]


class Shifted(Plain):
    def given(self, rotary, hidden, embedded):
        return rotary[0] + embedded.mean(), rotary[1]


class Short(Plain):
    def called(self):
        return self.model.layers[:-1]


class Sometimes(Plain):
    """Calls its last layer for many tokens alone."""

    def between(self, layer_idx, hidden, embedded):
        self.long = hidden.shape[1] > 5
        return hidden

    def called(self):
        yield from self.model.layers[:-1]
        if self.long:
            yield self.model.layers[-1]


class Twice(Plain):
    def called(self):
        return [*self.model.layers, self.model.layers[0]]


class Summed(Plain):
    def last(self, outputs):
        return outputs[-1] + outputs[0]


class Handing(Plain):
    """Its layers return something beside hidden states, which the next one is given."""

    def forward(
        self, input_ids, position_ids=None, past_key_values=None, use_cache=None, return_dict=None
    ):
        hidden, handed = self.model.embed_tokens(input_ids), None
        rotary = self.model.rotary_emb(hidden, position_ids)
        for i, layer in enumerate(self.model.layers):
            given = self.handed_on(i, handed)
            hidden, handed = layer(
                hidden,
                past_key_values=past_key_values,
                position_embeddings=rotary,
                handed=given,
            )
        return CausalLMOutputWithPast(logits=self.lm_head(self.model.norm(hidden)))

    def handed_on(self, layer_idx, handed):
        return handed


class HandingChanged(Handing):
    def handed_on(self, layer_idx, handed):
        return handed * 2 if layer_idx == 2 else handed


class HandingOnce(Handing):
    def handed_on(self, layer_idx, handed):
        self.first = self.first if layer_idx > 1 else handed
        return self.first


class HandingLayer(LlamaDecoderLayer):
    def forward(self, hidden, handed=None, **options):
        output = super().forward(hidden, **options)
        return output, output.mean(-1)


class HandingMore(Handing):
    """Its last layers hand on more than its first one."""


class HandingMoreLayer(HandingLayer):
    def forward(self, hidden, handed=None, **options):
        output = super().forward(hidden, **options)[0]
        return output, output.mean(-1) if handed is None else output


class Keeping(Plain):
    def last(self, outputs):
        self.kept = outputs[-1]
        return self.kept


class Counting(Plain):
    """Writes into a tensor of its own."""

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("count", torch.zeros(1), persistent=False)

    def last(self, outputs):
        self.count += 1
        return outputs[-1]


class Converting(Plain):
    """Converts a constant when it is first run, and keeps it so."""

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("table", torch.ones(32, dtype=torch.float64), persistent=False)

    def last(self, outputs):
        self.table = self.table.to(outputs[-1].dtype)
        return outputs[-1] * self.table


def opened(kind):
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, attn_implementation="eager",
    )  # fmt: skip
    with torch.device("meta"):
        model = kind(config)
        if issubclass(kind, Handing):
            made = HandingMoreLayer if kind is HandingMore else HandingLayer
            layers = [made(config, i) for i in range(3)]
            model.model.layers = torch.nn.ModuleList(layers)
    return OwnForward(model, Layout(3, own_forward=True), list(model.model.layers))


def followed(kind):
    return follow_forward(opened(kind), torch.float32, ())


def test_what_is_seen():
    """What layers remember, and of what their arguments are made."""
    facts = followed(Plain)
    kinds = {memory.kind for memory in facts.memories}
    assert [(k.kind, k.num_kv_heads, k.head_dim, k.states) for k in kinds] == [("full", 2, 8, ())]
    assert facts.width == 32
    assert facts.hidden_shape(2, 7) == (2, 7, 32)
    assert not facts.uses_embedding
    assert not facts.shared
    assert followed(Shifted).uses_embedding


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Scaled, "computes between layers 1 and 2"),
        (Turned, "gives layer 1 what another layer computed"),
        (Twice, "makes 4 calls of 3 layers"),
        (Summed, "makes logits of more than what its last layer gives"),
        (HandingChanged, "hands different values on from layer to layer"),
        (HandingOnce, "hands different values on from layer to layer"),
        (HandingMore, "hands different values on from layer to layer"),
        (Keeping, "keeps what it has computed in .kept"),
        (Counting, "keeps what it has computed in .count"),
    ],
)
def test_refuses_what_it_would_leave_out(kind, reason):
    """Each would give wrong tokens."""
    with pytest.raises(UnsupportedError, match=f"{kind.__name__} {reason}"):
        followed(kind)


def test_layers_that_are_not_called():
    """As those for images: they are left out, and never called unseen."""
    assert followed(Short).called == (0, 1)
    assert followed(Plain).called == (0, 1, 2)
    own = opened(Sometimes)
    own.facts = follow_forward(own, torch.float32, ())
    assert own.facts.called == (0, 1)
    ids = torch.zeros(1, 7, dtype=torch.long, device="meta")
    rows = torch.empty(7, 32, device="meta")
    with pytest.raises(UnsupportedError, match="calls layer 2, which it does not for a text alone"):
        own.leave(ids, ids, rows, own.new_cache(), torch.empty(1, 7, 32, device="meta"), 1)


def test_values_that_layers_hand_on():
    """Their number in what a layer returns, and the name by which the next one is given them."""
    assert followed(Handing).handed == {1: "handed"}
    assert not followed(Plain).handed


def test_constants_that_are_converted():
    """The dtype in which they stay is told, so that they are so from the start."""
    assert followed(Converting).converted == {".table": torch.float32}
    assert not followed(Plain).converted
