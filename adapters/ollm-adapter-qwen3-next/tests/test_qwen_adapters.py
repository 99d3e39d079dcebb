"""The Qwen declarations against transformers' own models, and hybrids of many layers."""

from __future__ import annotations

import copy
import importlib
import json
import sys
from importlib.metadata import entry_points

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

import ollm
from ollm_adapter_qwen3_next import (
    Qwen3MoeAdapter,
    Qwen3NextAdapter,
    Qwen35Adapter,
    Qwen35MoeAdapter,
)
from ollm_conformance.subject import Reference, greedy
from ollm_core import CheckpointError, ConfigError, KVStoreError, UnsupportedError
from ollm_core.testing import Registry

ADAPTERS = [Qwen3NextAdapter, Qwen3MoeAdapter, Qwen35MoeAdapter, Qwen35Adapter]
NEXT = Qwen3NextAdapter()


def config_with(**changes):
    return {**NEXT.tiny_config(), **changes}


def random_model(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**copy.deepcopy(config)),
        attn_implementation="eager",
        experts_implementation="eager",
    )
    model = model.eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.2 if parameter.dim() > 1 else 0.05)
        if name.endswith("A_log"):
            torch.nn.init.uniform_(parameter, 0, 2)
    return model


def expected_of(directory, prompt, num_new, dtype=torch.float32):
    """Tokens and logits of un-offloaded transformers, the prompt at once."""
    return Reference(directory, dtype, chunk_size=len(prompt)).greedy(prompt, num_new)


def prompt_of(num_tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, 500, (num_tokens,), generator=generator)


def test_entry_point_is_found():
    """The installed distribution registers its adapters for their model types."""
    found = entry_points(group="ollm.adapters", name="qwen3-next")
    assert [entry_point.dist.name for entry_point in found] == ["ollm-adapter-qwen3-next"]
    registry = Registry.discover(found)
    for adapter in ADAPTERS:
        for model_type in adapter.model_types:
            assert registry.adapter_for({"model_type": model_type}).name == adapter.name


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_config_without_experts_or_sizes_is_one_line(adapter):
    """What cannot be a model is refused with the key that says so."""
    config = adapter().tiny_config()
    key = "num_experts" if "num_experts" in config else "linear_value_head_dim"
    for value in (0, "many", None):
        with pytest.raises(ConfigError, match=key):
            adapter().layout({**config, key: value})


def test_layers_of_linear_attention_only_where_the_family_has_them():
    """Qwen3-MoE ignores layer types, Qwen3-Next refuses those it does not know."""
    with pytest.raises(UnsupportedError, match="layer 1 of type 'chunked_attention'"):
        NEXT.layout(config_with(layer_types=["full_attention", "chunked_attention"] * 2))
    config = config_with(layer_types=None, num_hidden_layers=8, full_attention_interval=3)
    assert NEXT.layout(config).mixers == ("recurrent", "recurrent", "full") * 2 + ("recurrent",) * 2


def test_what_drafts_is_ignored_and_what_is_foreign_is_not():
    """The tensors of multi-token prediction are known to be superfluous, others are an error."""
    model = random_model(NEXT.tiny_config())
    names = stored_names(model)
    drafting = {"mtp.fc.weight", "mtp.layers.0.mlp.experts.3.up_proj.weight"}
    assert NEXT.weights(NEXT.tiny_config(), names | drafting).ignored == drafting
    with pytest.raises(CheckpointError, match=r"mlp\.experts\.99\.up_proj"):
        NEXT.weights(NEXT.tiny_config(), names | {"model.layers.0.mlp.experts.99.up_proj.weight"})
    with pytest.raises(CheckpointError, match="lacks tensor"):
        NEXT.weights(NEXT.tiny_config(), names - {"model.layers.0.linear_attn.A_log"})


@pytest.mark.parametrize("package", ["fla", "causal_conv1d"])
def test_kernels_that_transformers_would_take_are_refused(monkeypatch, tmp_path, package):
    """Where a package is installed that gives other bits; a model without such layers does not
    mind.
    """
    place = tmp_path / "packages" / package
    place.mkdir(parents=True)
    monkeypatch.syspath_prepend(place.parent)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(NEXT.tiny_config()))
    assert ollm.plan(config).fits  # a directory of that name is no package
    (place / "__init__.py").touch()
    importlib.invalidate_caches()
    monkeypatch.delitem(sys.modules, package, raising=False)  # transformers has tried it
    for adapter in (NEXT, Qwen3MoeAdapter()):
        config = tmp_path / f"{adapter.name}.json"
        config.write_text(json.dumps(adapter.tiny_config()))
        if adapter is NEXT:
            with pytest.raises(UnsupportedError, match="is installed") as refused:
                ollm.plan(config)
            assert "pip uninstall" in refused.value.hint
        else:
            assert ollm.plan(config).fits


def stored_names(model):
    """The names of a hub checkpoint: three tensors for each expert."""
    names = set()
    for name, value in model.state_dict().items():
        path, _, leaf = name.rpartition(".")
        if not path.endswith(".experts"):
            names.add(name)
            continue
        parts = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else ("down_proj",)
        for expert in range(value.shape[0]):
            names.update(f"{path}.{expert}.{part}.weight" for part in parts)
    return names


@pytest.mark.parametrize(("num_layers", "dtype"), [(8, torch.float32), (48, torch.bfloat16)])
def test_many_layers_with_kv_on_disk(tmp_path, num_layers, dtype):
    """As many layers as the real model has in its dtype: every logit is that of transformers, in
    the process that read the prompt and in the next one.
    """
    config = config_with(layer_types=None, num_hidden_layers=num_layers, mlp_only_layers=[])
    checkpoint = tmp_path / "model"
    random_model(config).to(dtype).save_pretrained(checkpoint)
    prompt = prompt_of(330)
    tokens, logits = expected_of(checkpoint, prompt, 12, dtype)
    options = {"device": "cpu", "kv": "disk", "kv_dir": tmp_path / "kv", "attention": "exact"}
    with ollm.load(checkpoint, chunk_size=1024, **options) as model:
        found, found_logits = greedy(model, prompt, 12)
        assert model.stats.cached_tokens == 0
    assert found == tokens
    assert torch.equal(found_logits, logits.float())
    again = torch.cat([prompt, torch.tensor(tokens[:11])])
    with ollm.load(checkpoint, chunk_size=1024, **options) as model:
        found, found_logits = greedy(model, torch.cat([again, torch.tensor(tokens[11:])]), 1)
        assert model.stats.cached_tokens == len(again)
    following = expected_of(checkpoint, prompt, len(tokens) + 1, dtype)[0][-1:]
    assert found_logits.argmax(-1).tolist() == following


def test_a_cut_that_one_row_refuses_cuts_no_row(tmp_path):
    """Columns that are the short row's whole text: it could go back, the longer one cannot."""
    random_model(NEXT.tiny_config()).save_pretrained(tmp_path)
    long, short, other = prompt_of(30), prompt_of(10, seed=1), prompt_of(4, seed=2)
    ids = torch.stack([torch.cat([torch.zeros(20, dtype=torch.long), short]), long])
    mask = torch.ones_like(ids)
    mask[0, :20] = 0
    grown = torch.nn.functional.pad(mask, (0, 4), value=1)
    both = other.expand(2, -1)
    with ollm.load(tmp_path, device="cpu") as model:
        caches = [model.new_cache() for _ in range(2)]
        for cache in caches:
            model(input_ids=ids, attention_mask=mask, past_key_values=cache)
        with pytest.raises(KVStoreError, match="recurrent states, and none after 18 tokens"):
            caches[0].crop(-12)
        assert [caches[0].num_tokens(row) for row in range(2)] == [10, 30]
        found, expected = (
            model(input_ids=both, attention_mask=grown, past_key_values=cache).logits
            for cache in caches
        )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("drafts", [{"prompt_lookup_num_tokens": 3}, {}])
def test_after_a_drafted_text_a_prompt_is_no_draft(tmp_path, drafts):
    """What is scored on the cache next is computed in chunks, with transformers' bits, and no state
    is kept for each of its tokens.
    """
    random_model(NEXT.tiny_config()).save_pretrained(tmp_path)
    prompt, second = prompt_of(10).repeat(3), prompt_of(40, seed=1)
    reference = Reference(tmp_path, torch.float32, chunk_size=64)
    with ollm.load(tmp_path, device="cpu", attention="exact", kv="host") as model:
        if not drafts:
            model.draft_with(lambda token_ids, num_tokens: token_ids[:num_tokens])
        cache = model.new_cache()
        options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, **drafts}
        model.generate(prompt[None], max_new_tokens=5, past_key_values=cache, **options)
        cache.crop(-cache.get_seq_length())
        found = model(input_ids=second[None], past_key_values=cache).logits[0]
        fresh = model.new_cache()
        model(input_ids=second[None], past_key_values=fresh)
        assert cache.store.tier_bytes() == fresh.store.tier_bytes()
    assert torch.equal(found, reference.run(second))


def test_a_checkpoint_with_the_drafting_layer_opens(tmp_path):
    """Hub checkpoints have one; it changes nothing."""
    random_model(NEXT.tiny_config()).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    extra = {"mtp.fc.weight": torch.ones(64, 128), "mtp.norm.weight": torch.ones(64)}
    save_file({**tensors, **extra}, path, metadata={"format": "pt"})
    prompt = prompt_of(40)
    tokens, logits = expected_of(tmp_path, prompt, 5)
    with ollm.load(tmp_path, device="cpu", precision="exact") as model:
        found, found_logits = greedy(model, prompt, 5)
    assert found == tokens
    assert torch.equal(found_logits, logits)


@pytest.mark.parametrize(
    ("adapter", "whole"), [(Qwen35MoeAdapter, "qwen3_5_moe"), (Qwen35Adapter, "qwen3_5")]
)
@pytest.mark.parametrize("stacked", [False, True])
def test_the_language_model_of_one_that_also_sees(tmp_path, adapter, whole, stacked):
    """The text of a Qwen3.5 checkpoint is read as transformers does that reads images too."""
    text = adapter().tiny_config()
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2}
    config = AutoConfig.for_model(
        whole,
        text_config=text,
        vision_config={**vision, "out_hidden_size": 64, "num_position_embeddings": 16},
        image_token_id=500,
        video_token_id=501,
        vision_start_token_id=502,
        vision_end_token_id=503,
    )
    torch.manual_seed(0)
    model = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)](config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.set_attn_implementation("eager")
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    model.save_pretrained(tmp_path)
    if stacked:
        stack_experts(tmp_path / "model.safetensors")
    prompt = prompt_of(50)
    with torch.no_grad():
        expected = model(input_ids=prompt[None]).logits[0]
    with ollm.load(tmp_path, device="cpu", attention="exact", chunk_size=64) as streamed:
        found = streamed(input_ids=prompt[None]).logits[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


def stack_experts(path):
    """Rewrite a checkpoint so that one tensor holds all experts of a layer."""
    tensors = load_file(path)
    for gate in sorted(name for name in tensors if name.endswith("experts.0.gate_proj.weight")):
        base = gate.removesuffix("0.gate_proj.weight")
        count = sum(name.startswith(base) and name.endswith("gate_proj.weight") for name in tensors)
        pop = [
            [tensors.pop(f"{base}{i}.{part}_proj.weight") for part in ("gate", "up", "down")]
            for i in range(count)
        ]
        tensors[f"{base}gate_up_proj"] = torch.stack([torch.cat([g, u]) for g, u, _ in pop])
        tensors[f"{base}down_proj"] = torch.stack([down for *_, down in pop])
    save_file(tensors, path, metadata={"format": "pt"})
