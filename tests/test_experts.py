"""Mixtures of experts: only what was routed to is read, once per layer and pass, and every bit is
that of the un-offloaded model.
"""

from __future__ import annotations

import json
import threading
from collections import Counter, defaultdict
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    MixtralConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

import ollm
from ollm_core import (
    CheckpointError,
    DecoderAdapter,
    DoesNotFitError,
    ParameterSource,
    ReadError,
    WeightPlan,
)
from ollm_core.checkpoint import open_checkpoint
from ollm_core.chunks import NewTokens
from ollm_core.loading import DTYPES
from ollm_core.registry import Registry
from ollm_core.tracing import AllocationTracker


def fused(gate, up):
    """The rows of the gate, then those of the other half."""
    return torch.cat([gate, up])


ATTENTION = [f"self_attn.{name}_proj.weight" for name in "qkvo"]
NORMS = ["input_layernorm.weight", "post_attention_layernorm.weight"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
DENSE = [f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")]
QUERY_NORMS = ["self_attn.q_norm.weight", "self_attn.k_norm.weight"]
SHARED = ["mlp.shared_expert_gate.weight", *(f.replace("mlp", "mlp.shared_expert") for f in DENSE)]


class MoeAdapter(DecoderAdapter):
    """What the families below share: a tensor for each expert and projection."""

    projections = ("gate_proj", "up_proj", "down_proj")
    stored_mlp = "mlp"
    stacked = False
    layer_extra: tuple[str, ...] = ()
    moe_extra: tuple[str, ...] = ()

    def layout(self, config):
        return replace(super().layout(config), experts="mlp.experts")

    def layer_parameters(self, config, layer_idx):
        dense = layer_idx in config.get("mlp_only_layers", ())
        mlp = DENSE if dense else ["mlp.gate.weight", *EXPERTS, *self.moe_extra]
        return [*ATTENTION, *NORMS, *self.layer_extra, *mlp]

    def source(self, config, parameter):
        return ParameterSource((parameter.replace(".mlp.", f".{self.stored_mlp}."),))

    def experts(self, config, parameter):
        path, _, leaf = parameter.rpartition(".")
        if not path.endswith("mlp.experts"):
            return ()
        count = config.get("num_local_experts") or config["num_experts"]
        if self.stacked:
            return [ParameterSource((parameter,), row=i) for i in range(count)]
        gate, up, down = self.projections
        path = path.replace(".mlp.", f".{self.stored_mlp}.")
        if leaf == "down_proj":
            return [ParameterSource((f"{path}.{i}.{down}.weight",)) for i in range(count)]
        return [
            ParameterSource((f"{path}.{i}.{gate}.weight", f"{path}.{i}.{up}.weight"), fused)
            for i in range(count)
        ]

    def tiny_config(self):
        return FAMILIES[self.name][1].to_dict()


class Mixtral(MoeAdapter):
    """Mixtral: its files have other names than its module tree."""

    name = "mixtral"
    model_types = ("mixtral",)
    projections = ("w1", "w3", "w2")
    stored_mlp = "block_sparse_moe"


class Qwen3Moe(MoeAdapter):
    """Qwen3-MoE: many small experts, some layers dense."""

    name = "qwen3_moe"
    model_types = ("qwen3_moe",)
    layer_extra = tuple(QUERY_NORMS)


class StackedQwen3Moe(Qwen3Moe):
    """The same, stored as the module tree has it: all experts of a layer in one tensor."""

    stacked = True


class Qwen2Moe(MoeAdapter):
    """Qwen2-MoE: a shared expert beside the routed ones, and biases in attention."""

    name = "qwen2_moe"
    model_types = ("qwen2_moe",)
    layer_extra = tuple(f"self_attn.{name}_proj.bias" for name in "qkv")
    moe_extra = tuple(SHARED)


COMMON = {
    "vocab_size": 199,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "num_experts_per_tok": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
FAMILIES = {
    "mixtral": (
        Mixtral,
        MixtralConfig(
            **COMMON, intermediate_size=96, num_local_experts=6, sliding_window=None
        ),
    ),
    "qwen3_moe": (
        Qwen3Moe,
        Qwen3MoeConfig(
            **COMMON | {"num_experts_per_tok": 3},
            intermediate_size=96,
            moe_intermediate_size=32,
            num_experts=16,
            mlp_only_layers=[1],
            norm_topk_prob=True,
        ),
    ),
    "qwen2_moe": (
        Qwen2Moe,
        Qwen2MoeConfig(
            **COMMON,
            intermediate_size=96,
            moe_intermediate_size=32,
            shared_expert_intermediate_size=48,
            num_experts=8,
        ),
    ),
}
BOTH = ["mixtral", "qwen3_moe"]


@pytest.fixture
def make_moe(tmp_path):
    """Writes a random checkpoint of a family and returns its directory."""

    def make(family, dtype=torch.float32, *, name="", shard="1GB", **changes):
        torch.manual_seed(0)
        config = AutoConfig.for_model(**FAMILIES[family][1].to_dict() | changes)
        model = AutoModelForCausalLM.from_config(config).to(dtype)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.2)
        model.config.dtype = dtype
        directory = tmp_path / (name or family)
        model.save_pretrained(directory, max_shard_size=shard)
        return directory

    return make


def open_moe(directory, adapter=None, **options):
    """Open a checkpoint with the adapter for it."""
    family = json.loads((directory / "config.json").read_text())["model_type"]
    adapter = adapter or FAMILIES[family][0]()
    options = {"device": "cpu", "attention": "exact", "registry": Registry.of(adapter)} | options
    return ollm.load(directory, **options)


def smallest_budget(run, first=100_000):
    """The least bytes with which `run` passes, as its refusals say."""
    for _ in range(4):
        try:
            run(first)
        except DoesNotFitError as refused:
            first = int(refused.hint.split("at least ")[1].split(" bytes")[0])
        else:
            return first
    raise AssertionError("the refusals do not settle")


def stored_bytes(directory):
    """Bytes of all tensors."""
    return open_checkpoint(directory).total_bytes


class Routing:
    """Which experts each layer of an un-offloaded model is asked for, seen at its routers."""

    def __init__(self, model):
        self.seen = defaultdict(set)
        for layer_idx, layer in enumerate(model.model.layers):
            if router := dict(layer.named_modules()).get("mlp.gate"):
                router.register_forward_hook(
                    lambda _, __, output, i=layer_idx: self.seen[i].update(
                        output[2].flatten().tolist()
                    )
                )

    def count(self):
        """Distinct experts since the last call, over all layers."""
        total = sum(map(len, self.seen.values()))
        self.seen.clear()
        return total


@pytest.fixture
def reference_of(reference):
    """The un-offloaded model, its experts computed eagerly."""

    def make(directory, dtype):
        found = reference(directory, dtype)
        found.model.set_experts_implementation("eager")
        return found

    return make


CASES = [
    # dtype, chunk size, KV tier, reading engine
    ("float32", 64, "disk", "direct"),
    ("float16", 100, "host", "mmap"),
    ("bfloat16", 333, "device", "direct"),
]


@pytest.mark.parametrize("room", ["all", "few", "least"])
@pytest.mark.parametrize(("dtype", "chunk_size", "kv", "reader"), CASES)
@pytest.mark.parametrize("family", BOTH)
def test_logits_are_bitwise(
    make_moe, reference_of, ids, tmp_path, family, dtype, chunk_size, kv, reader, room
):
    """Every logit of 1,100 tokens is transformers', whether all experts are kept, some or none."""
    directory = make_moe(family, DTYPES[dtype])
    prompt = ids(1100)
    expected = reference_of(directory, DTYPES[dtype]).logits(prompt, chunk_size)

    def run(num_bytes):
        options = {"chunk_size": chunk_size, "kv": kv, "kv_dir": tmp_path, "reader": reader}
        with open_moe(directory, device_memory=num_bytes, keep_kv=False, **options) as model:
            for _ in range(2):
                assert torch.equal(model(input_ids=prompt[None]).logits[0], expected)
            stats = model.stats
            assert stats.experts_routed == stats.experts_hit + stats.experts_read
            return stats

    if room == "all":
        stats = run(60_000_000)
        assert stats.experts_hit == stats.experts_read > 0  # the second pass has what the first read
    else:
        least = smallest_budget(run)
        stats = run(least if room == "least" else least + stored_bytes(directory) // 2)
        assert (stats.experts_hit == 0) == (room == "least")
        assert stats.experts_hit < stats.experts_read


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_shared_expert_is_bitwise(make_moe, reference_of, ids, dtype):
    """A family with a shared expert, which every token goes through, gives transformers' bits."""
    directory = make_moe("qwen2_moe", DTYPES[dtype])
    prompt = ids(300)
    tokens, logits = reference_of(directory, DTYPES[dtype]).greedy(prompt, 12, 64)
    with open_moe(directory, chunk_size=64, device_memory="2MB") as model:
        found = model.generate(
            prompt[None],
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
            return_dict_in_generate=True,
            output_logits=True,
        )
    assert found.sequences[0, 300:].tolist() == tokens
    assert torch.equal(torch.cat(found.logits), logits.float())


class Reads:
    """Counts how often each tensor, or row of one, is asked of a model's byte source."""

    def __init__(self, model):
        self.seen = Counter()
        source = model.weights._source
        real = source.read

        def read(tensors, buffer):
            self.seen.update(tensor.name for tensor in tensors)
            return real(tensors, buffer)

        source.read = read

    def take(self, wanted="mlp.experts."):
        """Reads since the last call of tensors with `wanted` in their name."""
        found = {name: count for name, count in self.seen.items() if wanted in name}
        self.seen.clear()
        return found


@pytest.mark.parametrize("shard", ["1GB", "120KB"])
@pytest.mark.parametrize("stored", ["per expert", "stacked"])
def test_only_routed_experts_are_read_each_once(make_moe, reference_of, ids, stored, shard):
    """A pass reads exactly the experts that the un-offloaded model's routers choose, each once per
    layer, whatever the chunks and rows, and from however many files.
    """
    directory = make_moe("qwen3_moe", shard=shard)
    assert (len(list(directory.glob("*.safetensors"))) > 3) == (shard == "120KB")
    plain = reference_of(directory, torch.float32)
    routing = Routing(plain.model)
    adapter = Qwen3Moe()
    if stored == "stacked":
        for path in directory.glob("*.safetensors*"):
            path.unlink()
        save_file(plain.model.state_dict(), directory / "model.safetensors")
        adapter = StackedQwen3Moe()
    prompt = ids(90)
    with open_moe(directory, adapter, chunk_size=16, device_memory="1.2MB") as model:
        reads = Reads(model)
        cache = model.new_cache("host")
        for begin, end in ((0, 50), (50, 51), (51, 52), (52, 56), (56, 90)):
            expected = plain.logits(prompt[:end], 16 if begin == 0 else end)
            routing.count()
            before = model.stats
            found = model(input_ids=prompt[None, begin:end], past_key_values=cache).logits[0]
            after = model.stats
            if begin == 0:
                assert torch.equal(found, expected)
            plain.logits(prompt[:begin], 16) if begin else None
            assert after.experts_hit == 0
            asked = after.experts_routed - before.experts_routed
            assert asked == after.experts_read - before.experts_read
            seen = reads.take()
            assert set(seen.values()) == {1}
            assert len(seen) == asked * (2 if stored == "stacked" else 3)
            if begin == 0:
                wanted = {(i, e) for i, experts in chosen(plain, prompt[:end], 16) for e in experts}
                assert asked == len(wanted)
                assert {expert_of(name) for name in seen} == wanted
