"""Layers that slide, models that mix them with full ones, and sinks: exact in every KV store."""

from __future__ import annotations

import pytest
import torch
from smallest_memory import check_refusal_to_the_byte
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    MistralConfig,
    Qwen3Config,
)

import ollm
from ollm_core import (
    CacheKind,
    ConfigError,
    KVStoreError,
    Layout,
    ModelAdapter,
    ParameterSource,
    WeightPlan,
)
from ollm_core.device.dtypes import DTYPES
from ollm_core.engine.batch import NewTokens
from ollm_core.memory.tracker import AllocationTracker
from ollm_core.model.skeleton import Skeleton
from ollm_core.plugins.registry import Registry

SIZES = {
    "vocab_size": 199,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 8192,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]


def mistral(window, **sizes):
    """Every layer slides."""
    return MistralConfig(**SIZES | {"num_hidden_layers": 2} | sizes, sliding_window=window)


def qwen3(window, **sizes):
    """Full and sliding layers, queries and keys normed."""
    return Qwen3Config(
        **SIZES | {"num_hidden_layers": 3} | sizes,
        use_sliding_window=True,
        sliding_window=window,
        layer_types=MIXED * (sizes.get("num_hidden_layers", 3) // 3),
    )


def gpt_oss(window, **sizes):
    """Alternating windows, sinks, experts that are whole parameters of their layer."""
    return GptOssConfig(
        **SIZES | {"num_hidden_layers": 2} | sizes,
        sliding_window=window,
        num_local_experts=4,
        num_experts_per_tok=2,
    )


FAMILIES = {"mistral": mistral, "qwen3": qwen3, "gpt_oss": gpt_oss}


class ByName(ModelAdapter):
    """Any family whose tensors have the names of the parameters."""

    name = "by-name"
    model_types = ("mistral", "qwen3", "gpt_oss")

    def layout(self, config):
        return Layout(config["num_hidden_layers"])

    def weights(self, config, tensor_names):
        return WeightPlan({name: ParameterSource((name,)) for name in tensor_names})

    def caches(self, config):
        types = config.get("layer_types") or ["sliding_attention"] * config["num_hidden_layers"]
        heads = {"num_kv_heads": config["num_key_value_heads"], "head_dim": config["head_dim"]}
        return tuple(
            CacheKind("sliding", **heads, window=config["sliding_window"])
            if kind == "sliding_attention"
            else CacheKind("full", **heads)
            for kind in types
        )

    def tiny_config(self):
        return mistral(16).to_dict()


class WithCaches(ByName):
    """Says something else about its caches."""

    def __init__(self, *kinds):
        self._kinds = kinds

    def caches(self, config):
        return self._kinds


def load(directory, adapter=None, **options):
    """The model in a directory, on the CPU."""
    registry = Registry.discover([])
    registry._adapters["by-name"] = adapter or ByName()
    return ollm.load(directory, device="cpu", registry=registry, **options)


@pytest.fixture
def make(tmp_path):
    """Writes a random checkpoint of a family and returns its directory."""

    def make_one(family, window, dtype=torch.float32, **sizes):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(FAMILIES[family](window, **sizes)).to(dtype)
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 or name.endswith("sinks"):
                torch.nn.init.normal_(parameter, std=2.0 if name.endswith("sinks") else 0.2)
        model.config.dtype = dtype
        directory = tmp_path / f"{family}-{window}"
        model.save_pretrained(directory)
        return directory

    return make_one


CASES = [
    # family, dtype, window, chunk size, KV tier
    ("mistral", "float32", 64, 64, "disk"),
    ("mistral", "float16", 300, 128, "device"),
    ("mistral", "bfloat16", 256, 512, "host"),
    ("mistral", "bfloat16", 2, 100, "disk"),
    ("qwen3", "float32", 40, 333, "host"),
    ("qwen3", "bfloat16", 600, 256, "disk"),
    ("qwen3", "float16", 257, 64, "disk"),
    ("gpt_oss", "float32", 128, 100, "disk"),
    ("gpt_oss", "bfloat16", 100, 512, "device"),
    ("gpt_oss", "bfloat16", 256, 64, "disk"),
]


@pytest.mark.parametrize(("family", "dtype", "window", "chunk_size", "kv"), CASES)
def test_logits_are_bitwise(make, reference, ids, tmp_path, family, dtype, window, chunk_size, kv):
    """Every logit of a prompt over many windows, and of 8 tokens after it, is transformers'."""
    directory = make(family, window, DTYPES[dtype])
    plain = reference(directory, DTYPES[dtype])
    prompt = ids(1100)
    tokens, after = plain.greedy(prompt, 8, chunk_size)
    with load(
        directory, kv=kv, keep_kv=False, kv_dir=tmp_path, chunk_size=chunk_size, attention="exact"
    ) as model:
        found = model(input_ids=prompt[None]).logits[0]
        assert torch.equal(found, plain.run(prompt, chunk_size))
        out = model.generate(
            prompt[None], max_new_tokens=8, do_sample=False, eos_token_id=None,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
    assert out.sequences[0, 1100:].tolist() == tokens
    assert torch.equal(torch.cat(out.logits), after.float())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("window", "chunk_size", "kv"),
    [(50, 333, "device"), (300, 64, "disk"), (300, 512, "device"), (256, 256, "disk")],
)
def test_blockwise_is_within_1e_5(make, reference, ids, tmp_path, family, window, chunk_size, kv):
    """Block-wise attention with windows and sinks differs by less than 1e-5 of the logits'
    scale.
    """
    directory = make(family, window)
    prompt = ids(1000)
    expected = reference(directory, torch.float32).run(prompt, chunk_size)
    with load(
        directory,
        kv=kv,
        keep_kv=False,
        kv_dir=tmp_path,
        chunk_size=chunk_size,
        attention="blockwise",
    ) as model:
        found = model(input_ids=prompt[None]).logits[0]
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_ragged_batch(make, ids, family):
    """Left-padded rows, past the window and not, give the tokens of each prompt alone."""
    directory = make(family, 40)
    prompts = [ids(200, seed=1), ids(90, seed=2), ids(10, seed=3)]
    padded = torch.zeros(3, 200, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        padded[row, 200 - len(prompt) :] = prompt
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    with load(directory, chunk_size=64) as model:
        found = model.generate(padded, attention_mask=(padded > 0).long(), **options)[:, 200:]
        for row, prompt in enumerate(prompts):
            alone = model.generate(prompt[None], **options)[0, len(prompt) :]
            assert torch.equal(found[row], alone)


@pytest.mark.parametrize(
    ("family", "kv"),
    [("mistral", "device"), ("mistral", "disk"), ("qwen3", "host"), ("gpt_oss", "disk")],
)
def test_back_and_forth(make, ids, tmp_path, family, kv):
    """A draft taken back, a fork and a second turn go on bit for bit; further back is refused."""
    directory = make(family, 100)
    prompt, other = ids(900), ids(300, seed=2)
    with load(
        directory, kv=kv, keep_kv=False, kv_dir=tmp_path, chunk_size=128, attention="exact"
    ) as model:
        cache = model.new_cache()
        model(input_ids=prompt[None], past_key_values=cache)
        expected = model(input_ids=other[None], past_key_values=cache).logits
        for draft in (1, 40, 200):
            cache = model.new_cache()
            model(input_ids=prompt[None], past_key_values=cache)
            model(input_ids=ids(draft, seed=3)[None], past_key_values=cache)
            cache.crop(-draft)
            cache.batch_repeat_interleave(2)
            found = model(input_ids=other.expand(2, -1), past_key_values=cache).logits
            assert torch.allclose(found, expected.expand_as(found), atol=1e-4)
            cache.batch_select_indices(torch.tensor([1]))
            cache.crop(-1)
            assert cache.get_seq_length() == 1199
        with pytest.raises(KVStoreError, match="sliding window, and only its last"):
            cache.crop(-900)
        assert cache.get_seq_length() == 1199
        assert cache.store.num_tokens(cache.rows[0]) == 1199
        cache = model.new_cache()
        model(input_ids=prompt[None], past_key_values=cache)
        model(input_ids=ids(200, seed=3)[None], past_key_values=cache)
        cache.crop(-200)
        assert torch.equal(model(input_ids=other[None], past_key_values=cache).logits, expected)
        assert cache.is_sliding == [kind == "sliding_attention" for kind in layer_types(model)]


def layer_types(model):
    """Of each layer, as transformers names them."""
    config = model.config
    return getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers


@pytest.mark.parametrize("kv", ["device", "host", "disk"])
def test_interrupted_pass_is_undone(make, ids, tmp_path, kv):
    """Ctrl-C after any step of a second turn longer than all windows leaves the cache as it was."""
    directory = make("qwen3", 60)
    prompt, turn = ids(500), ids(900, seed=2)
    with load(
        directory, kv=kv, keep_kv=False, kv_dir=tmp_path, chunk_size=200, attention="exact"
    ) as model:
        cache = model.new_cache()
        model(input_ids=prompt[None], past_key_values=cache)
        held = cache.store.tier_bytes()
        for stop in (1, 4, 8, 15):

            def interrupt(progress, stop=stop):
                if progress.steps_done == stop:
                    raise KeyboardInterrupt

            model.on_progress(interrupt)
            with pytest.raises(KeyboardInterrupt):
                model(input_ids=turn[None], past_key_values=cache)
            assert cache.get_seq_length() == 500
            now = cache.store.tier_bytes()
            assert (now.device, now.disk) == (held.device, held.disk)
        model.on_progress(None)
        found = model(input_ids=turn[None], past_key_values=cache).logits
        fresh = model.new_cache()
        model(input_ids=prompt[None], past_key_values=fresh)
        assert torch.equal(found, model(input_ids=turn[None], past_key_values=fresh).logits)


@pytest.mark.parametrize("kv", ["device", "host", "disk"])
def test_memory_does_not_grow_with_the_prompt(make, ids, tmp_path, kv):
    """While the prompt doubles, layers that slide take no more than window, chunk and slack."""
    directory = make("mistral", 100)
    token_bytes = 2 * 2 * 2 * 16 * 4  # layers, K and V, heads, dim, float32
    block_bytes = 256 * token_bytes
    with load(directory, kv=kv, keep_kv=False, kv_dir=tmp_path, chunk_size=128) as model:
        peaks, after = [], []
        for num_tokens in (2000, 4000):
            cache, seen = model.new_cache(), []

            def look(_, cache=cache, seen=seen):
                held = cache.store.tier_bytes()
                seen.append(held.disk if kv == "disk" else held.device + held.host)

            model.on_progress(look)
            model(input_ids=ids(num_tokens)[None], past_key_values=cache, logits_to_keep=1)
            look(None)
            peaks.append(max(seen))
            after.append(seen[-1])
            cache.close()
    bound = (100 + 128 + 256) * token_bytes
    assert peaks[0] == peaks[1] <= bound + 2 * block_bytes + 2 * 4096
    assert after[1] <= (100 + 256) * token_bytes + 2 * block_bytes + 2 * 4096


@pytest.mark.parametrize("attention", ["exact", "blockwise"])
@pytest.mark.parametrize("family", FAMILIES)
def test_budget_is_enforced_to_the_byte(make, ids, family, attention):
    """A run passes at the budget that the refusal names, and fails one byte below."""
    ffn = 96 if family == "gpt_oss" else 1024
    directory = make(family, 70, hidden_size=256, intermediate_size=ffn, num_hidden_layers=6)
    prompt = ids(900)

    def run(num_bytes):
        with load(
            directory, device_memory=num_bytes, kv="device", chunk_size=128, attention=attention
        ) as model:
            model(input_ids=prompt[None], logits_to_keep=1)
            return model.stats.device_peak_bytes

    check_refusal_to_the_byte(run, 4_500_000)


@pytest.mark.parametrize("attention", ["exact", "blockwise"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_planned_activations_cover_the_real_ones(make, ids, family, dtype, attention):
    """What torch really allocates in a pass is at most what was planned, ids and positions
    aside.
    """
    directory = make(family, 300, DTYPES[dtype], hidden_size=256)
    with load(directory, device_memory="60MB", chunk_size=256, attention=attention) as model:
        cache = model.new_cache("device")
        prompt = ids(1400)
        model(input_ids=prompt[None, :700], past_key_values=cache, logits_to_keep=1)
        work = [NewTokens(cache.rows[0], prompt[700:], 700)]
        growth = cache.store.growth_bytes(cache.rows[0], 1400, 256).device
        with model.engine._pass_planner.admit(cache.store, work) as plan:
            pass
        with AllocationTracker("cpu") as tracker:
            model.engine.run(cache.store, work)
    assert growth > 0
    assert tracker.peak <= plan.needed.device + 16 * 700
    assert tracker.peak >= 0.4 * plan.needed.device


def test_what_is_refused(make):
    """Recurrent layers, impossible windows and a wrong number of layers: one line each."""
    directory = make("mistral", 40)
    heads = {"num_kv_heads": 2, "head_dim": 16}
    full = CacheKind("full", **heads)
    for error, message, kinds in (
        (ConfigError, "says of layer 1 that it is recurrent", (full, CacheKind("recurrent"))),
        (ConfigError, "window of 1 tokens", (full, CacheKind("sliding", **heads, window=1))),
        (ConfigError, "window of None tokens", (full, CacheKind("sliding", **heads))),
        (ConfigError, "keeps all tokens", (full, CacheKind("full", **heads, window=8))),
        (ConfigError, "gives 1 caches, expected 2", (full,)),
    ):
        with pytest.raises(error, match=message):
            load(directory, WithCaches(*kinds))


def test_more_is_kept_than_declared_needs(make, reference, ids):
    """A layer that slides may be kept whole: what attention sees is the module's own window."""
    directory = make("mistral", 40)
    adapter = WithCaches(*[CacheKind("full", num_kv_heads=2, head_dim=16)] * 2)
    with load(directory, adapter, chunk_size=64, attention="exact") as model:
        found = model(input_ids=ids(300)[None]).logits[0]
    assert torch.equal(found, reference(directory, torch.float32).run(ids(300), 64))


def test_rotary_embeddings_by_layer_type():
    """Gemma 3's global and local frequencies reach their layers; without types it is refused."""
    config = Gemma3TextConfig(**SIZES | {"num_hidden_layers": 3}, layer_types=MIXED)
    config.rope_parameters["sliding_attention"]["rope_theta"] = 10_000.0
    config.rope_parameters["full_attention"]["rope_theta"] = 1_000_000.0
    skeleton = Skeleton(config.to_dict(), Layout(3), torch.float32, torch.device("cpu"))
    positions = torch.arange(50)[None]
    hidden = torch.empty(1, 50, 64)
    found = [skeleton.embeddings(skeleton.rotary, i, hidden, positions)[0] for i in range(3)]
    model = AutoModelForCausalLM.from_config(config).model
    for cosines, layer_type in zip(found, MIXED, strict=True):
        assert torch.equal(cosines, model.rotary_emb(hidden, positions, layer_type)[0])
    assert not torch.equal(found[0], found[1])
