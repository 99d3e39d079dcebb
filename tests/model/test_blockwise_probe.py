"""Whether a model's layers can attend block by block: whatever would make it wrong is seen."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb

from ollm_core.attention.select import EAGER_NAME, register_attention
from ollm_core.contracts.model import Layout
from ollm_core.model.blockwise_probe import probe_blockwise
from ollm_core.model.follow_forward import follow_forward
from ollm_core.model.own_forward import OwnForward


def eager_attention_forward(module, query, key, value, mask, scaling, **options):
    """What `Plain` calls where attention is eager."""
    return module.eager(query, key, value, mask, scaling, **options)


class Plain(LlamaAttention):
    """An attention module whose forward is here, to be changed."""

    def forward(
        self, hidden_states, position_embeddings=None, attention_mask=None, past_key_values=None,
        **options,
    ):  # fmt: skip
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            project(hidden_states).view(shape).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, _ = attend(
            self, query, self.cached(key), value, self.mask(attention_mask), scaling=self.scaling,
            **self.options(),
        )  # fmt: skip
        output = output.reshape(*hidden_states.shape[:-1], -1)
        return self.o_proj(self.after(output, attention_mask)), None

    def eager(self, query, key, value, mask, scaling, **options):
        return modeling_llama.eager_attention_forward(
            self, query, key, value, mask, scaling, **options
        )

    def cached(self, key):
        return key

    def mask(self, mask):
        return mask

    def options(self):
        return {}

    def after(self, output, mask):
        return output


class Scales(Plain):
    """Its keys are changed after the cache."""

    def cached(self, key):
        return key * 2


class Sharpens(Plain):
    """Its eager attention is another one."""

    def eager(self, query, key, value, mask, scaling, **options):
        return super().eager(query, key, value, mask, 1.5 * scaling)


class Hardly(Plain):
    """Its eager attention caps scores at so much that small ones do not show it."""

    softcap = 50.0

    def eager(self, query, key, value, mask, scaling, **options):
        heads = self.num_key_value_groups
        key, value = key.repeat_interleave(heads, 1), value.repeat_interleave(heads, 1)
        scores = query @ key.transpose(2, 3) * scaling
        scores = self.softcap * (scores / self.softcap).tanh()
        return ((scores + mask).softmax(-1) @ value).transpose(1, 2).contiguous(), None


class Named(Plain):
    """Hands on an option that eager attention makes use of."""

    def options(self):
        return {"temperature": 2.0}

    def eager(self, query, key, value, mask, scaling, temperature=None):
        return super().eager(query, key, value, mask, scaling / temperature)


class Biased(Plain):
    """Makes a mask of its own where it is given none."""

    def mask(self, mask):
        return torch.zeros(1) if mask is None else mask


class Looks(Plain):
    """Uses the mask elsewhere, too."""

    def after(self, output, mask):
        return output if mask is None else output + mask.mean()


class Knows(Plain):
    """Does something else where attention is not eager."""

    def after(self, output, mask):
        return output if self.config._attn_implementation == "eager" else output * 2


class Ignored(Plain):
    """Hands on an option that eager attention takes and does nothing with."""

    def options(self):
        return {"output_router_logits": False, "is_causal": True}


class Hides(LlamaForCausalLM):
    """Its mask hides what is far away."""

    far = 100

    def forward(self, input_ids, position_ids=None, past_key_values=None, **options):
        start = past_key_values.get_seq_length()
        eager = self.config._attn_implementation == "eager"
        mask = None
        if eager:
            at = torch.arange(start, start + input_ids.shape[1], device=input_ids.device)[:, None]
            back = at - torch.arange(start + input_ids.shape[1], device=input_ids.device)
            hidden = (back < 0) | (back >= self.far)
            mask = torch.zeros(hidden.shape, device=input_ids.device)
            mask = mask.masked_fill(hidden, torch.finfo(mask.dtype).min)[None, None]
        hidden = self.model.embed_tokens(input_ids)
        rotary = self.model.rotary_emb(hidden, position_ids)
        for layer in self.model.layers:
            hidden = layer(
                hidden, attention_mask=mask, past_key_values=past_key_values,
                position_embeddings=rotary,
            )  # fmt: skip
        return {"logits": self.lm_head(self.model.norm(hidden))}


class Hid(Hides):
    """The same, which hides nothing that is ever seen."""

    far = 10**6


class Counts(Hid):
    """Makes something for each token before."""

    def forward(self, input_ids, position_ids=None, past_key_values=None, **options):
        torch.ones(past_key_values.get_seq_length(), device=input_ids.device)
        return super().forward(input_ids, position_ids, past_key_values, **options)


def probed(attention=LlamaAttention, kind=LlamaForCausalLM):
    """What is seen of a small Llama of such parts."""
    register_attention()
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, attn_implementation=EAGER_NAME,
    )  # fmt: skip
    with torch.device("meta"):
        model = kind(config).eval()
        for i, layer in enumerate(model.model.layers):
            layer.self_attn = attention(model.config, i)
    layers = list(model.model.layers)
    own = OwnForward(model, Layout(3, own_forward=True), layers)
    own.facts = follow_forward(own, torch.float32, ())
    found = probe_blockwise(own, layers, (), 2048)
    assert model.config._attn_implementation == EAGER_NAME
    return found


@pytest.mark.parametrize("attention", [LlamaAttention, Plain, Ignored])
def test_what_can(attention):
    """Layers that hand on what the cache gives them."""
    found = probed(attention)
    assert found.refusal == ""
    assert not found.grows


@pytest.mark.parametrize(
    ("attention", "reason"),
    [
        (Scales, "do not hand on what a cache gives them: TypeError"),
        (Sharpens, "eager attention of Sharpens gives other numbers"),
        (Hardly, "eager attention of Hardly gives other numbers"),
        (Named, "eager attention of Named gives other numbers"),
        (Biased, "Biased gives attention a mask of its own"),
        (Looks, "computes aten.mean"),
        (Knows, "and aten.mul"),
    ],
)
def test_what_cannot(attention, reason):
    """Each would give wrong tokens."""
    assert reason in probed(attention).refusal


def test_masks():
    """A mask must show what core's attention sees, at any distance."""
    assert probed(kind=Hid).refusal == ""
    assert probed(kind=Hides).refusal == (
        "the mask of layer 0 shows something else than all earlier tokens"
    )


def test_what_grows():
    """It is allowed, and planned."""
    found = probed(kind=Counts)
    assert found.refusal == ""
    assert found.grows
