"""Mixtures of experts: only what was routed to is read, once per layer and pass, and every bit is
that of the un-offloaded model.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections import Counter
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GptOssConfig,
    MixtralConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

import ollm
from ollm_core import (
    CheckpointError,
    DecoderAdapter,
    DoesNotFitError,
    EncodedTensor,
    ParameterSource,
    ReadError,
    UnsupportedError,
    WeightPlan,
)
from ollm_core.checkpoint.safetensors import open_checkpoint
from ollm_core.cli.report import json_report, summary
from ollm_core.engine.batch import NewTokens
from ollm_core.memory.tracker import AllocationTracker
from ollm_core.model.spec import DTYPES
from ollm_core.plugins.loader import Offer
from ollm_core.plugins.registry import Registry
from ollm_core.weights.experts.store import ExpertStore


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


class GptOss(MoeAdapter):
    """gpt-oss, not quantised: stacked experts with biases and a gate of its own, a router of
    another name, sinks, and windows in every second layer.
    """

    name = "gpt_oss"
    model_types = ("gpt_oss",)
    stacked = True
    layer_extra = (
        "self_attn.sinks",
        *(f"self_attn.{name}_proj.bias" for name in "qkvo"),
    )

    def layer_parameters(self, config, layer_idx):
        stacks = [name + suffix for name in EXPERTS for suffix in ("", "_bias")]
        router = ["mlp.router.weight", "mlp.router.bias"]
        return [*ATTENTION, *NORMS, *self.layer_extra, *router, *stacks]


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
        MixtralConfig(**COMMON, intermediate_size=96, num_local_experts=6, sliding_window=None),
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
FAMILIES["gpt_oss"] = (
    GptOss,
    GptOssConfig(
        **COMMON,
        intermediate_size=48,
        num_local_experts=6,
        sliding_window=40,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
)
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
    """The least bytes with which `run` passes, as its refusals say, and what it then returns."""
    for _ in range(4):
        try:
            return first, run(first)
        except DoesNotFitError as refused:
            first = int(refused.hint.split("at least ")[1].split(" bytes")[0])
    raise AssertionError("the refusals do not settle")


class Plain:
    """An un-offloaded model that goes on from call to call, and what its routers choose."""

    def __init__(self, reference):
        self.model = reference.model
        self.cache = DynamicCache(config=self.model.config)
        self.chosen = set()
        for layer_idx, layer in enumerate(self.model.model.layers):
            if router := dict(layer.named_modules()).get("mlp.gate"):
                router.register_forward_hook(
                    lambda _, __, output, i=layer_idx: self.chosen.update(
                        (i, expert) for expert in output[2].flatten().tolist()
                    )
                )

    @torch.no_grad()
    def __call__(self, ids, chunk_size):
        """Logits [R, T, V] of the next tokens [R, T], and the (layer, expert) pairs chosen."""
        self.chosen = set()
        found = [
            self.model(input_ids=chunk, past_key_values=self.cache, use_cache=True).logits
            for chunk in ids.split(chunk_size, dim=1)
        ]
        return torch.cat(found, dim=1), self.chosen


CASES = [
    # dtype, chunk size, KV tier, reading engine
    ("float32", 64, "disk", "direct"),
    ("float16", 100, "host", "mmap"),
    ("bfloat16", 333, "device", "direct"),
]


@pytest.mark.parametrize(("dtype", "chunk_size", "kv", "reader"), CASES)
@pytest.mark.parametrize("family", BOTH)
def test_logits_are_bitwise(
    make_moe, reference, ids, tmp_path, family, dtype, chunk_size, kv, reader
):
    """Every logit of 1,100 tokens is transformers', whether all experts are kept, some or none."""
    directory = make_moe(family, DTYPES[dtype])
    prompt = ids(1100)
    expected = reference(directory, DTYPES[dtype]).run(prompt, chunk_size)

    def run(num_bytes, num_passes=1):
        options = {"chunk_size": chunk_size, "kv": kv, "kv_dir": tmp_path, "reader": reader}
        with open_moe(directory, device_memory=num_bytes, keep_kv=False, **options) as model:
            for _ in range(num_passes):
                assert torch.equal(model(input_ids=prompt[None]).logits[0], expected)
            stats = model.stats
            assert stats.experts_routed == stats.experts_hit + stats.experts_read
            assert stats.device_peak_bytes <= num_bytes
            return stats

    stats = run(60_000_000, num_passes=2)
    assert stats.experts_hit == stats.experts_read > 0  # the second pass has what the first read
    least, stats = smallest_budget(run)
    assert stats.experts_hit == 0
    stored = open_checkpoint(directory).total_bytes
    stats = run(least + stored // 2, num_passes=2)
    assert 0 < stats.experts_hit < stats.experts_read


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss"])
def test_other_mixtures_are_bitwise(make_moe, reference, ids, family, dtype):
    """A shared expert that every token goes through, or experts with biases and a gate of their
    own: 12 greedy tokens and the logits behind them are transformers'.
    """
    directory = make_moe(family, DTYPES[dtype])
    prompt = ids(300)
    tokens, logits = reference(directory, DTYPES[dtype]).greedy(prompt, 12, 64)
    with open_moe(directory, chunk_size=64, device_memory="3MB") as model:
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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_chunk_goes_through_once(make_moe, reference, ids, dtype):
    """A decode step computes norm, router and shared expert once; a prompt in chunks, which waits
    for all of its routers, twice. Both give transformers' bits.
    """
    directory = make_moe("qwen2_moe", DTYPES[dtype])
    plain, prompt = Plain(reference(directory, DTYPES[dtype])), ids(97)
    with open_moe(directory, chunk_size=32) as model:
        calls = Counter()
        for layer in model.engine._skeleton.layers:
            for name in ("post_attention_layernorm", "mlp.gate", "mlp.shared_expert"):
                layer.get_submodule(name).register_forward_hook(
                    lambda module, states, _, name=name: calls.update(
                        () if states[0].is_meta else [name]  # the plan traces them too
                    )
                )
        cache = model.new_cache("host")
        for begin, end, times in ((0, 96, 3 * 2 * 3), (96, 97, 3)):
            tokens = prompt[None, begin:end]
            found = model(input_ids=tokens, past_key_values=cache).logits
            assert torch.equal(found, plain(tokens, 32)[0])
            assert set(calls.values()) == {times}
            assert len(calls) == 3
            calls.clear()


@pytest.mark.parametrize("num_tokens", [20, 100])
def test_a_layer_that_passes_its_experts_by_is_refused(make_moe, ids, num_tokens):
    """A declared MLP that does not call the experts is named, in one chunk or several."""

    class PassesBy(Qwen3Moe):
        def layout(self, config):
            return replace(super().layout(config), mlp=lambda layer, hidden: hidden)

    with pytest.raises(UnsupportedError, match="did not call its experts"):  # noqa: SIM117
        with open_moe(make_moe("qwen3_moe"), PassesBy(), chunk_size=32) as model:
            model(input_ids=ids(num_tokens)[None])


def test_halves_that_leave_something_out_are_refused(make_moe):
    """A residual multiplier that the standard halves know nothing of, by its value."""

    class Scaled(Qwen3Moe):
        def layout(self, config):
            return replace(super().layout(config), mixer=scaled_mixer)

    def scaled_mixer(layer, hidden, **options):
        return (
            hidden
            + 0.22 * layer.self_attn(hidden_states=layer.input_layernorm(hidden), **options)[0]
        )

    told = r"aten.add.Tensor.* gives aten.mul.Tensor\(\[1, 1, 64\], 0.22\)"
    with pytest.raises(UnsupportedError, match=told):
        open_moe(make_moe("qwen3_moe"), Scaled())


def test_halves_with_another_norm_are_refused(make_moe):
    """By the name of the parameter."""

    class Swapped(Qwen3Moe):
        def layout(self, config):
            return replace(super().layout(config), mixer=swapped_mixer)

    def swapped_mixer(layer, hidden, **options):
        normed = layer.post_attention_layernorm(hidden)
        return hidden + layer.self_attn(hidden_states=normed, **options)[0]

    with pytest.raises(
        UnsupportedError, match=r"input_layernorm.* gives .*post_attention_layernorm"
    ):
        open_moe(make_moe("qwen3_moe"), Swapped())


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


def expert_of(name):
    """Layer and expert of a tensor, or of a row of one."""
    found = re.search(r"layers\.(\d+)\.mlp\.experts\.(?:(\d+)\.|\w+\[(\d+)\])", name)
    return int(found[1]), int(found[2] or found[3])


@pytest.mark.parametrize("family", ["qwen3_moe", "stacked"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_other_dtype_than_stored(make_moe, reference, ids, family, dtype):
    """Experts stored in bf16 and computed in another dtype give transformers' bits."""
    directory = make_moe("qwen3_moe", torch.bfloat16)
    plain = reference(directory, DTYPES[dtype])
    prompt = ids(150)
    if family == "stacked":
        state = {name: value.bfloat16() for name, value in plain.model.state_dict().items()}
        save_file(state, directory / "model.safetensors")
    adapter = StackedQwen3Moe() if family == "stacked" else Qwen3Moe()
    with open_moe(directory, adapter, chunk_size=64, dtype=dtype, device_memory="1.6MB") as model:
        for _ in range(2):
            found = model(input_ids=prompt[None]).logits[0]
            assert torch.equal(found, plain.run(prompt, 64))
        assert 0 < model.stats.experts_hit <= model.stats.experts_read


def test_progress_reaches_its_end(make_moe, ids):
    """Layers with experts count two steps a chunk, and the last step is the total."""
    seen = []
    with open_moe(make_moe("qwen3_moe"), chunk_size=32, on_progress=seen.append) as model:
        model(input_ids=ids(80)[None])
    assert [p.steps_done for p in seen] == list(range(seen[-1].steps_total + 1))
    assert seen[-1].steps_total == 3 * (3 + 2) + 1


def test_run_tells_of_experts(make_moe, ids):
    """What `ollm run` says of experts, in JSON and in its summary; of a dense model it says
    nothing.
    """
    with open_moe(make_moe("mixtral")) as model:
        model(input_ids=ids(30)[None])
        stats = model.stats
    told = json_report("", [], 30, stats)
    assert told["experts_routed"] == told["experts_read"] + told["experts_hit"] > 0
    assert told["expert_bytes_read"] == stats.expert_bytes_read > 0
    assert f"{stats.experts_routed} routed to" in summary(stats)
    dense = replace(stats, experts_routed=0)
    assert "experts_routed" not in json_report("", [], 30, dense)
    assert "experts" not in summary(dense)


@pytest.mark.parametrize("stacked", [False, True])
def test_encoded_experts(make_moe, ids, stacked):
    """A codec decodes each expert's tensors; a row of a tensor encoded as a whole is refused."""

    def codec(request):
        found = {}
        for name, info in request.tensors.items():
            if name.endswith(".neg"):
                parts = (name,), info.dtype, info.shape, torch.neg
                found[name.removesuffix(".neg")] = EncodedTensor(*parts)
        return found

    directory = make_moe("qwen3_moe")
    with open_moe(directory, chunk_size=64) as model:
        expected = model(input_ids=ids(90)[None]).logits
    tensors = load_file(directory / "model.safetensors")
    if stacked:
        tensors = AutoModelForCausalLM.from_pretrained(directory).state_dict()
    encoded = {f"{n}.neg": -t for n, t in tensors.items() if ".experts." in n}
    plain = {n: t for n, t in tensors.items() if ".experts." not in n}
    save_file(encoded | plain, directory / "model.safetensors")
    adapter = StackedQwen3Moe() if stacked else Qwen3Moe()
    registry = Registry.of(adapter)
    registry._offers["ollm_weight_codecs", "n"] = Offer("ollm_weight_codecs", "n", codec, "test")
    if stacked:
        with pytest.raises(CheckpointError, match="encoded as a whole"):
            open_moe(directory, adapter, registry=registry)
        return
    with open_moe(directory, adapter, registry=registry, chunk_size=64) as model:
        for _ in range(2):
            assert torch.equal(model(input_ids=ids(90)[None]).logits, expected)


@pytest.fixture
def keep_none(monkeypatch):
    """No expert is kept, however much room there is."""

    class KeepsNone(ExpertStore):
        def place(self, device_bytes, host_bytes):
            return super().place(self.least_bytes, self.least_bytes)

    monkeypatch.setattr("ollm_core.weights.placement.ExpertStore", KeepsNone)


@pytest.mark.parametrize("stored", ["one file", "shards", "stacked"])
def test_only_routed_experts_are_read_each_once(make_moe, reference, ids, keep_none, stored):
    """A pass reads exactly the experts that the un-offloaded model's routers choose, each once per
    layer, whatever the chunks and rows, and from however many files.
    """
    directory = make_moe("qwen3_moe", shard="120KB" if stored == "shards" else "1GB")
    assert (len(list(directory.glob("*.safetensors"))) > 3) == (stored == "shards")
    plain = Plain(reference(directory, torch.float32))
    if stored == "stacked":
        save_file(plain.model.state_dict(), directory / "model.safetensors")
    adapter = StackedQwen3Moe() if stored == "stacked" else Qwen3Moe()
    prompt = ids(180).reshape(2, 90)
    with open_moe(directory, adapter, chunk_size=32) as model:
        reads, cache = Reads(model), model.new_cache("host")
        # A prompt in chunks, a row each; decode steps and a draft, the rows together; more prompt.
        for begin, end in ((0, 50), (50, 51), (51, 52), (52, 56), (56, 90)):
            before, tokens = model.stats, prompt[:, begin:end]
            found = model(input_ids=tokens, past_key_values=cache).logits
            after = model.stats
            expected, chosen = plain(tokens, 32)
            assert torch.allclose(found, expected, atol=1e-3)
            seen = reads.take("mlp.experts.")
            assert {expert_of(name) for name in seen} == chosen
            assert set(seen.values()) == {1}
            assert len(seen) == len(chosen) * (2 if stored == "stacked" else 3)
            assert after.experts_routed - before.experts_routed == len(chosen)
            assert after.experts_read - before.experts_read == len(chosen)
            assert after.experts_hit == 0
            num_bytes = after.expert_bytes_read - before.expert_bytes_read
            one, gap = 3 * 32 * 64 * 4, 64 << 10  # neighbours this near are read at once
            assert len(chosen) * one <= num_bytes <= len(chosen) * (one + gap)


@pytest.mark.parametrize("family", BOTH)
def test_kept_experts_are_not_read_again(make_moe, reference, ids, family):
    """What a pass does not find in memory it reads, and only that; what is kept was read once."""
    directory = make_moe(family, torch.bfloat16)
    plain = Plain(reference(directory, torch.bfloat16))
    with open_moe(directory, chunk_size=64, device_memory="0.8MB") as model:
        reads, cache = Reads(model), model.new_cache("host")
        total, begin = Counter(), 0
        for end in (64, *range(65, 90)):
            before = model.stats
            tokens = ids(90)[None, begin:end]
            found = model(input_ids=tokens, past_key_values=cache).logits
            expected, chosen = plain(tokens, 64)
            assert torch.equal(found, expected)
            after = model.stats
            seen = reads.take("experts.")
            assert after.experts_routed - before.experts_routed == len(chosen)
            assert after.experts_read - before.experts_read == len(seen) // 3
            total.update(seen)
            begin = end
        assert 0 < after.experts_hit < after.experts_routed
        assert min(total.values()) == 1 < max(total.values())


def test_neighbours_are_read_together(make_moe, ids):
    """Experts that lie side by side in a file are brought by one read call."""
    directory = make_moe("qwen3_moe")
    with open_moe(directory, chunk_size=64) as model:
        source, runs = model.weights._source, []
        real = source._read_run
        source._read_run = lambda run, buffer: (runs.append(run), real(run, buffer))
        model(input_ids=ids(64)[None])
        assert model.stats.experts_read > 20
        assert len(runs) < model.stats.experts_read // 2


@pytest.mark.parametrize("stored", ["a tensor each", "stacked"])
def test_calls_of_the_kernel(make_moe, monkeypatch, stored):
    """What lies together in a file is one `preadv`, in the order of the file: an expert's three
    tensors, and neighbours that are rows of one tensor. Experts are 192 KiB each, so that those
    between are not read along.
    """
    directory = make_moe("qwen3_moe", hidden_size=256, moe_intermediate_size=64, num_experts=16)
    if stored == "stacked":
        tensors = AutoModelForCausalLM.from_pretrained(directory).state_dict()
        save_file(tensors, directory / "model.safetensors")
    adapter = StackedQwen3Moe() if stored == "stacked" else Qwen3Moe()
    calls, real = [], os.preadv

    def preadv(file, buffers, offset, *rest):
        calls.append((offset, sum(map(len, buffers))))
        return real(file, buffers, offset, *rest)

    with open_moe(directory, adapter, chunk_size=64, reader="direct") as model:
        model.weights.fit(100_000_000, 0)
        monkeypatch.setattr(os, "preadv", preadv)
        for wanted, runs in (([5], 1), ([2, 3, 4], 1), ([1, 6, 9, 12], 4)):
            calls.clear()
            with model.weights.experts(0, wanted) as found:
                assert [e for e, _ in found] == wanted
            units = [model.weights.expert_units[0][e] for e in wanted]
            # The rows of a stacked tensor lie apart from those of the other one.
            assert len(calls) == runs * (2 if stored == "stacked" else 1)
            assert calls == sorted(calls)
            one = sum(unit.file_bytes for unit in units)
            assert one <= sum(length for _, length in calls) <= one + len(calls) * 2 * 4096
            for unit in units:
                for tensor in unit.tensors:
                    end = tensor.offset + tensor.num_bytes
                    assert any(at <= tensor.offset and end <= at + n for at, n in calls)


@pytest.mark.parametrize("kv", ["host", "disk"])
def test_a_failed_expert_read_leaves_a_usable_model(
    make_moe, reference, ids, tmp_path, keep_none, kv
):
    """A read of experts that fails in the middle of a pass is reported; the cache and the model go
    on, and what they give then is right.
    """
    directory = make_moe("qwen3_moe", torch.bfloat16)
    prompt = ids(200)
    plain = Plain(reference(directory, torch.bfloat16))
    with open_moe(directory, chunk_size=64, kv=kv, kv_dir=tmp_path) as model:
        cache = model.new_cache()
        model(input_ids=prompt[None, :128], past_key_values=cache)
        plain(prompt[None, :128], 64)
        source = model.weights._source
        real, countdown = source.read, [2]

        def failing(tensors, buffer):
            countdown[0] -= any("experts" in tensor.name for tensor in tensors)
            if countdown[0] == 0:
                raise ReadError("the disk is gone")
            return real(tensors, buffer)

        source.read = failing
        with pytest.raises(ReadError, match="the disk is gone"):
            model(input_ids=prompt[None, 128:], past_key_values=cache)
        assert cache.get_seq_length() == 128
        assert cache.store.num_tokens(cache.rows[0], 0) == 128
        found = model(input_ids=prompt[None, 128:], past_key_values=cache).logits
        assert countdown[0] < 0
        assert torch.equal(found, plain(prompt[None, 128:], 64)[0])


def test_a_gone_disk_is_forgotten_when_it_is_back(make_moe, ids):
    """Reads of experts and of the layers ahead fail together; the pass after it works."""
    directory = make_moe("mixtral", torch.bfloat16)
    prompt = ids(200)[None]

    def run(num_bytes):
        with open_moe(directory, chunk_size=64, device_memory=num_bytes, kv="host") as model:
            expected = model(input_ids=prompt).logits
            source = model.weights._source
            real, gone = source.read, [False]

            def failing(tensors, buffer):
                gone[0] |= any("experts" in tensor.name for tensor in tensors)
                if gone[0]:
                    raise ReadError("the disk is gone")
                return real(tensors, buffer)

            source.read = failing
            with pytest.raises(ReadError, match="the disk is gone"):
                model(input_ids=prompt)
            time.sleep(0.1)  # the ring reads ahead, and fails too
            source.read = real
            assert torch.equal(model(input_ids=prompt).logits, expected)

    smallest_budget(run)


def test_an_interrupted_pass_leaves_a_usable_model(make_moe, ids):
    """Ctrl-C while experts are computed is passed on; the next pass is right."""
    directory = make_moe("mixtral")
    prompt = ids(100)[None]
    with open_moe(directory, chunk_size=32, device_memory="1.5MB") as model:
        expected = model(input_ids=prompt).logits
        mixture = model.engine._skeleton.mixtures[1]
        real = mixture.add

        def interrupt(*arguments):
            raise KeyboardInterrupt

        mixture.add = interrupt
        with pytest.raises(KeyboardInterrupt):
            model(input_ids=prompt)
        mixture.add = real
        assert torch.equal(model(input_ids=prompt).logits, expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", BOTH)
def test_budget_is_enforced_to_the_byte(make_moe, ids, family, dtype):
    """A run passes at the budget that the refusal names and fails one byte below; that budget is
    less than one layer with all its experts.
    """
    num_experts = {"mixtral": 64, "qwen3_moe": 256}[family]
    directory = make_moe(family, DTYPES[dtype], num_local_experts=num_experts)
    prompt = ids(300)[None]

    def run(num_bytes):
        with open_moe(directory, device_memory=num_bytes, kv="host", chunk_size=64) as model:
            model(input_ids=prompt, logits_to_keep=1)
            return model.stats.device_peak_bytes

    least, peak = smallest_budget(run)
    assert peak <= least
    with pytest.raises(DoesNotFitError, match=r"new tokens.*, limit"):
        run(least - 1)
    tensors = open_checkpoint(directory).tensors.values()
    assert least < sum(t.num_bytes for t in tensors if "layers.0." in t.name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", [*BOTH, "qwen2_moe"])
def test_planned_activations_cover_the_real_ones(make_moe, ids, family, dtype):
    """What torch really allocates in a pass is at most what was planned, and at least half of
    it: the plan allows for all tokens of a chunk going to one expert.
    """
    directory = make_moe(family, DTYPES[dtype], hidden_size=128)
    with open_moe(directory, chunk_size=128, device_memory="20MB") as model:
        cache = model.new_cache("device")
        prompt = ids(1000)
        for _ in range(2):  # until all that is kept is there
            model(input_ids=prompt[None], logits_to_keep=1)
        model(input_ids=prompt[None, :500], past_key_values=cache, logits_to_keep=1)
        work = [NewTokens(cache.rows[0], prompt[500:], 500)]
        with model.engine._admission.admit(cache.store, work) as plan:
            pass
        assert model.stats.experts_routed > model.stats.experts_hit > 0
        with AllocationTracker("cpu") as tracker:
            model.engine.run(cache.store, work)
        growth = cache.store.tier_bytes().device
    assert tracker.peak <= plan.needed.device + growth
    assert tracker.peak >= 0.5 * plan.needed.device


def test_ragged_pass_equals_each_alone(make_moe, ids):
    """A prompt, a decode step and a draft in one pass give the logits of three passes."""
    directory = make_moe("qwen3_moe")
    prompts = [ids(90, seed=1), ids(40, seed=2), ids(33, seed=3)]
    with open_moe(directory, chunk_size=32, device_memory="2MB") as model:
        cache = model.new_cache("host")
        store, expected, work = cache.store, [], []
        for prompt, num_new in zip(prompts, (90, 1, 4), strict=True):
            split = len(prompt) - num_new
            for keep in (True, False):
                sequence = store.new_sequence()
                if split:
                    model.engine.run(store, [NewTokens(sequence, prompt[:split], 0)])
                item = NewTokens(sequence, prompt[split:], split, num_new)
                if keep:
                    work.append(item)
                else:
                    expected += model.engine.run(store, [item])
        found = model.engine.run(store, work)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("options", [{}, {"draft": "lookup"}])
def test_generate_gives_the_tokens_of_transformers(make_moe, reference, ids, options):
    """Greedy tokens, plain and with drafts that are checked several at once, are transformers'."""
    directory = make_moe("mixtral")
    prompt = ids(20).repeat(3)
    tokens, _ = reference(directory, torch.float32).greedy(prompt, 16, 64)
    with open_moe(directory, device_memory="2MB", chunk_size=64, **options) as model:
        found = model.generate(prompt[None], max_new_tokens=16, do_sample=False, eos_token_id=None)
    assert found[0, 60:].tolist() == tokens


@pytest.mark.parametrize("family", [*BOTH, "gpt_oss"])
def test_inference_mode(make_moe, reference, ids, family):
    """A caller's inference mode changes nothing: a cache that began in it goes on outside."""
    directory, prompt = make_moe(family), ids(64)
    with open_moe(directory, chunk_size=32) as model:
        cache = model.new_cache("device")
        with torch.inference_mode():
            first = model(input_ids=prompt[None, :32], past_key_values=cache).logits[0]
        second = model(input_ids=prompt[None, 32:], past_key_values=cache).logits[0]
    expected = reference(directory, torch.float32).run(prompt, 32)
    assert torch.equal(torch.cat([first, second]), expected)


def test_two_models_on_two_threads(make_moe, reference, ids):
    """Two models interleaved on two threads do not meet."""
    prompt = ids(100)
    directories = [make_moe("mixtral"), make_moe("qwen3_moe")]
    expected = [reference(d, torch.float32).run(prompt, 32) for d in directories]
    right = {0: [], 1: []}

    def work(i):
        with open_moe(directories[i], device_memory="1.5MB", chunk_size=32) as model:
            for _ in range(4):
                logits = model(input_ids=prompt[None]).logits[0]
                right[i].append(torch.equal(logits, expected[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == {0: [True] * 4, 1: [True] * 4}


def test_close_frees_everything(make_moe, ids):
    """After close no thread is left and nothing is reserved; closing again does nothing."""
    model = open_moe(make_moe("mixtral"), device_memory="1.5MB", kv="host")
    model(input_ids=ids(20)[None])
    model.close()
    model.close()
    assert model.accounts.device.used == model.accounts.host.used == 0
    assert not [t for t in threading.enumerate() if t.name.startswith("ollm")]


@pytest.mark.parametrize("stacked", [False, True])
def test_the_plan_uses_every_tensor_once(make_moe, stacked):
    """As pure data, the plan names each tensor once, or each row of it once, or ignores it."""
    config = FAMILIES["qwen3_moe"][1]
    adapter = StackedQwen3Moe() if stacked else Qwen3Moe()
    tensors = open_checkpoint(make_moe("qwen3_moe")).tensors
    names = set(tensors)
    if stacked:
        names = {n for n in names if ".experts." not in n}
        names |= {f"model.layers.{i}.{leaf}" for i in (0, 2) for leaf in EXPERTS}
    plan = adapter.weights(config.to_dict(), names)
    used = Counter((name, s.row) for s in plan.sources() for name in s.tensors)
    assert set(used.values()) == {1}
    assert {name for name, _ in used} | plan.ignored == names
    rows = {row for name, row in used if "experts." in name}
    assert rows == (set(range(16)) if stacked else {None})
    assert not plan.parameters.keys() & plan.experts.keys()


class Wrong(Qwen3Moe):
    """Declares what the checkpoint and the model do not bear out."""

    def __init__(self, change):
        self.change = change

    def weights(self, config, tensor_names):
        plan = super().weights(config, tensor_names)
        return WeightPlan(plan.parameters, plan.ignored, self.change(dict(plan.experts)))


UP = "model.layers.0.mlp.experts.gate_up_proj"
DOWN = "model.layers.0.mlp.experts.down_proj"
NORM = ParameterSource(("model.norm.weight",), row=64)
WRONG_PLANS = {
    "an expert less": (lambda e: e | {UP: e[UP][1:]}, "15 experts are planned"),
    "none": (lambda e: {k: v for k, v in e.items() if k != UP}, "no checkpoint tensor|0 experts"),
    "another shape": (lambda e: e | {DOWN: e[UP]}, "has shape"),
    "a row too far": (lambda e: e | {DOWN: (NORM, *e[DOWN][1:])}, "needs row 64"),
    "no experts": (lambda e: e | {"model.norm.x": e[UP]}, "model.norm.x, which is no parameter"),
}


@pytest.mark.parametrize("case", WRONG_PLANS)
def test_a_wrong_plan_is_refused(make_moe, ids, case):
    """Experts that are missing, too many or of another shape are named before a pass gives wrong
    logits.
    """
    change, message = WRONG_PLANS[case]
    directory = make_moe("qwen3_moe")

    def run():
        with open_moe(directory, Wrong(change)) as model:
            model(input_ids=ids(64)[None])

    with pytest.raises(CheckpointError, match=message):
        run()
