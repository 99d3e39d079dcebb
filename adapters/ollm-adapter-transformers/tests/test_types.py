"""A dozen architectures that differ, each bit for bit transformers' own on a tiny model; and what
is refused, by name and reason.
"""

import gc
import json
from contextlib import closing

import pytest
import torch
from tiny import tiny_config
from trial import CHUNK, checks, run_ours, run_reference, saved, steps, try_type

import ollm
from ollm_adapter_transformers import TransformersAdapter
from ollm_core import (
    CheckpointError,
    ConfigError,
    DoesNotFitError,
    OllmError,
    UnknownModelError,
    UnsupportedError,
)
from ollm_core.testing import (
    NewTokens,
    Registry,
    TierTracker,
    as_opened,
    check_model,
    read_config,
    without_instructions,
)

DIFFER = {
    "bart": "the decoder of an encoder-decoder, whose cache has a layer for each of the encoder's",
    "bert": "embeddings of positions and types with a norm, a head of two products with a bias",
    "ctrl": "positions that are kept in the dtype of its first run",
    "qwen4_exp_text": "an index by blocks of tokens that asks which may be seen",
    "trocr": "a head that makes logits of every token",
    "deepseek_v2": "latent attention: keys and values of different sizes",
    "deepseek_v32": "a sparse index beside keys",
    "gptj": "a rotary embedding that attention computes, parallel blocks, a head with a bias",
    "jamba": "state-space layers, attention and experts in turns",
    "lfm2": "convolutions alone in some layers",
    "llama4_text": "chunked attention, and a forward that asks where its embedding is",
    "mllama": "layers for images, which a text alone does not call",
    "opt": "learned positions with an offset",
    "recurrent_gemma": "states that modules keep as attributes, beside windows of keys",
    "xlstm": "states in a cache of its own, which layers are given and return anew",
}


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    """Without the adapters of families."""
    monkeypatch.setenv("OLLM_LOAD_PLUGINS", "ollm-adapter-transformers")


@pytest.mark.parametrize("model_type", DIFFER)
def test_passes(model_type):
    """Logits of a prompt, steps, a batch, chunks with KV on disk, greedy text, and a plan."""
    found = dict(checks(model_type, torch.float32))
    assert found
    assert not {name: told for name, told in found.items() if told}
    assert ("tokens" in found) is (model_type in ("jamba", "recurrent_gemma"))


@pytest.mark.parametrize(
    "model_type", ["bloom", "ctrl", "deepseek_v3", "dots3_note_text", "falcon_h1"]
)
def test_passes_in_bfloat16(model_type):
    """What transformers keeps in float32 stays so: parameters, and an index beside keys."""
    assert not any(dict(checks(model_type, torch.bfloat16)).values())


@pytest.mark.parametrize(
    ("model_type", "chunk_size", "dtype", "precision"),
    [
        ("gpt2", None, torch.float32, "exact"),
        ("gemma2", 64, torch.bfloat16, "exact"),  # where its windows begin to slide
        ("mixtral", None, torch.float32, "exact"),
        ("mamba2", 64, torch.bfloat16, "exact"),  # adds up in float32
        ("qwen4_exp_text", None, torch.float32, "exact"),
        ("glm_moe_dsa", None, torch.float32, "exact"),
        ("recurrent_gemma", None, torch.bfloat16, "exact"),
        ("xlstm", 64, torch.bfloat16, "exact"),
        ("gemma3n_text", 64, torch.float32, "exact"),
        ("trocr", None, torch.float32, "exact"),
        ("xmod", None, torch.float32, "exact"),
        ("zamba2", None, torch.float32, "exact"),
        ("gemma2", 64, torch.bfloat16, "fast"),
        ("falcon_h1", 64, torch.bfloat16, "fast"),
    ],
)
def test_never_more_memory_than_told(model_type, chunk_size, dtype, precision):
    """What a prompt and steps really allocate on the device is within what the accounts hold."""
    with saved(model_type, dtype) as (_, directory):
        ids = torch.randint(3, 250, (2, 200))
        options = {"dtype": str(dtype)[6:], "chunk_size": chunk_size, "precision": precision}
        options |= {"kv": "disk", "kv_dir": directory / "kv", "keep_kv": False}  # nothing is found
        with without_instructions(), ollm.load(directory, device="cpu", **options) as model:
            run_ours(model, ids, steps(200))
            gc.collect()
            told = model.stats.device_peak_bytes - model.weights.in_memory.device
            with TierTracker(kv_on_device=False) as tracker:
                run_ours(model, ids, steps(200))
        assert 0 < tracker.peak <= told


@pytest.mark.parametrize("little", [False, True])
def test_layers_that_share_keys(tmp_path, little):
    """A model without any state whose later layers take the keys of earlier ones: two rows of
    different lengths, each in chunks of several windows, and a second turn; with room for all, and
    where what is handed on waits on the host.
    """
    with saved("gemma3n_text", torch.float32) as (model, directory):
        ids = torch.randint(3, 250, (2, 150))
        options = {"device": "cpu", "precision": "exact", "kv": "disk", "kv_dir": tmp_path}
        options |= {"chunk_size": CHUNK, "device_memory": "1GB"}
        turns = [[(0, 0, 130), (1, 0, 80)], [(0, 130, 150), (1, 80, 90)]]

        def run():
            with ollm.load(directory, **options) as ours, closing(ours.new_cache()) as cache:
                rows = [cache.store.new_sequence() for _ in range(2)]

                def new(row, start, end):
                    return NewTokens(rows[row], ids[row, start:end], start)

                return [ours.engine.run(cache.store, [new(*one) for one in turn]) for turn in turns]

        found = None
        if little:
            options["device_memory"] = 1
        while found is None:
            try:
                found = run()
            except DoesNotFitError as error:
                options["device_memory"] = error.needed_bytes
        for row, cuts in ((0, [64, 128, 130, 150]), (1, [64, 80, 90])):
            expected = run_reference(model, ids[row : row + 1], cuts)[0]
            assert torch.equal(found[0][row], expected[-2:-1])
            assert torch.equal(found[1][row], expected[-1:])


def test_layers_that_share_keys_find_a_prompt_again(tmp_path):
    """That an earlier opening has kept on disk: bit for bit what the same chunks give at once."""
    with saved("gemma3n_text", torch.float32) as (model, directory):
        ids = torch.randint(3, 250, (1, 300))
        options = {"device": "cpu", "precision": "exact", "kv": "disk", "kv_dir": tmp_path}
        for length in (280, 300):
            with ollm.load(directory, **options, chunk_size=CHUNK) as ours:
                found = run_ours(ours, ids[:, :length], [length])
                cached = ours.stats.cached_tokens
        assert cached == 280
        expected = run_reference(model, ids, [64, 128, 192, 256, 280, 300])
        assert torch.equal(found, expected[:, -1:])


@pytest.mark.parametrize(
    ("model_type", "path"), [("mixtral", "mlp.experts"), ("nemotron_h", ""), ("llama", "")]
)
def test_experts_are_read_one_by_one(model_type, path):
    """A pass over one token reads those that it chose; NemotronH adds up in float32."""
    with saved(model_type, torch.bfloat16) as (_, directory):
        adapter = TransformersAdapter()
        assert adapter.layout(adapter.text_config(read_config(directory))).experts == path
        with ollm.load(directory, device="cpu") as model:
            assert bool(model.weights.expert_units) is bool(path)


def test_is_built_once(monkeypatch):
    """The model that is looked at is the one that is run; another dtype makes another."""

    def fail(*_):
        raise AssertionError("built anew")

    with saved("llama", torch.bfloat16) as (_, directory):
        monkeypatch.setattr("ollm_core.model.own_skeleton.empty_model", fail)
        ollm.load(directory, device="cpu").close()
        with pytest.raises(AssertionError, match="built anew"):
            ollm.load(directory, device="cpu", dtype="float32")


@pytest.mark.parametrize(("key", "value"), [("num_hidden_layers", 10**6), ("hidden_size", 10**30)])
def test_refuses_absurd_numbers(key, value):
    """Before transformers begins to build a model of them."""
    adapter = TransformersAdapter()
    with pytest.raises(ConfigError, match=f"{key} must be an integer up to"):
        adapter.layout({**adapter.tiny_config(), "model_type": "llama", key: value})


def test_refuses_numbers_that_cannot_be_initialised():
    """xLSTM divides by the number of layers that it does not make."""
    config = {**tiny_config("xlstm").to_dict(), "num_hidden_layers": -1}
    adapter = TransformersAdapter()
    with pytest.raises(ConfigError, match="cannot initialise a xlstm model"):
        check_model(config, adapter.layout(config))


def test_opening_draws_no_numbers():
    """NemotronH makes some anew when its weights are initialised."""
    with saved("nemotron_h", torch.bfloat16) as (_, directory):
        before = torch.get_rng_state()
        ollm.load(directory, device="cpu").close()
        assert torch.equal(torch.get_rng_state(), before)


def test_what_core_finds_is_told():
    """Caches and limits of a model that is left to its own forward, as the suite asks for them."""
    adapter = TransformersAdapter()
    config = tiny_config("falcon_h1").to_dict()
    opened = as_opened(adapter, config)
    assert not adapter.caches(config)
    kinds = opened.caches(config)
    assert len(kinds) == config["num_hidden_layers"]
    assert all(kind.has_keys and kind.states for kind in kinds)
    limited = as_opened(adapter, tiny_config("jamba").to_dict())
    assert limited.capabilities["chunked-prefill"].support == "unsupported"
    assert "batch" not in opened.capabilities
    assert as_opened(adapter, {"model_type": "t5"}) is adapter


@pytest.mark.parametrize("model_id", ["gemma2-2B", "gemma3-1B", "mistral-7B", "phi4-14B"])
def test_plans_models_of_the_catalog(model_id, tmp_path, monkeypatch):
    """By id, without files: its size is that of the catalog, and it fits 8 GB."""
    monkeypatch.chdir(tmp_path)  # where no ./models is
    _, entry = Registry.discover().find(model_id)
    plan = ollm.plan(model_id, device="cpu", device_memory="8GB", context=8192)
    assert plan.fits
    assert plan.weight_bytes == entry.weight_bytes


def test_plans_a_model_without_keys_on_disk():
    """Its states stay in memory, and there are no files."""
    with saved("mamba", torch.float32) as (_, directory):
        plan = ollm.plan(directory, device="cpu", kv="disk", context=300, max_new_tokens=4)
    assert plan.fits
    assert plan.disk_bytes == 0


def test_a_cache_that_a_model_makes_is_not_kept():
    """Of xLSTM: what is left of a run is in the accounts."""
    with (
        saved("xlstm", torch.float32) as (_, directory),
        ollm.load(directory, device="cpu") as ours,
    ):
        run_ours(ours, torch.randint(3, 250, (1, 20)), [16, 20])
        gc.collect()
        assert not [one for one in gc.get_objects() if type(one).__name__ == "xLSTMCache"]


def test_refuses_a_prompt_that_a_model_would_take_in_parts():
    """xLSTM calls its layers again for each so many tokens."""
    with saved("xlstm", torch.float32, max_inference_chunksize=16) as (model, directory):
        ids = torch.randint(3, 250, (1, 40))
        with ollm.load(directory, device="cpu", precision="exact", chunk_size=16) as ours:
            found = run_ours(ours, ids, [40])
        assert torch.equal(found, run_reference(model, ids, [16, 32, 40])[:, -1:])
        with (
            ollm.load(directory, device="cpu", precision="exact", chunk_size=32) as ours,
            pytest.raises(UnsupportedError, match="takes 32 tokens in several parts"),
        ):
            run_ours(ours, ids, [40])


@pytest.mark.parametrize("model_type", ["bart", "trocr", "xglm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss(model_type, dtype):
    """The first two compare labels with the logits of their own positions, and take no number of
    items for them; the last one does as most.
    """
    with saved(model_type, dtype) as (model, directory):
        ids = torch.randint(3, 250, (2, 20))
        labels = ids.clone()
        labels[0, :7] = -100
        with ollm.load(directory, device="cpu", precision="exact", dtype=str(dtype)[6:]) as ours:
            for more in ({}, {"num_items_in_batch": 7}):
                with torch.no_grad():
                    expected = model(input_ids=ids, labels=labels, **more).loss
                found = ours(input_ids=ids, labels=labels, **more).loss
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("model_type", ["t5", "bart"])
def test_refuses_encoder_decoders(model_type):
    """Before anything is built; the decoder of one says that it is none."""
    registry = Registry.of(TransformersAdapter())
    for stated in ({}, {"is_encoder_decoder": True}):
        with pytest.raises(OllmError, match=rf"'{model_type}'.* is an encoder-decoder"):
            registry.adapter_for({"model_type": model_type, **stated})


def test_refuses_code_of_a_checkpoint():
    """`auto_map` is never followed."""
    config = {"model_type": "chatglm", "auto_map": {"AutoModelForCausalLM": "m.ChatGLM"}}
    with pytest.raises(UnknownModelError, match="Python code from its repository"):
        Registry.of(TransformersAdapter()).adapter_for(config)


def test_refuses_what_is_newer():
    """With the version that wrote it."""
    config = {"model_type": "llama9", "transformers_version": "6.1.0"}
    with pytest.raises(UnknownModelError, match="'llama9': transformers") as caught:
        Registry.of(TransformersAdapter()).adapter_for(config)
    assert "of transformers 6.1" in caught.value.hint


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_refuses_frequencies_that_depend_on_the_length(rope_type):
    """A prompt in chunks would get others."""
    config = {"model_type": "phi3", "rope_scaling": {"type": rope_type}}
    with pytest.raises(UnsupportedError, match=f"rope type {rope_type}"):
        Registry.of(TransformersAdapter()).adapter_for(config)


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("minimax", "keeps its past in a MiniMaxCache, not in transformers' usual cache"),
        ("longcat_flash", "caches for"),
        ("blt", "transformers makes no cache for a blt model"),
        ("jetmoe", r", in JetMoeTopKGating.forward"),
        ("gemma4_assistant", "Gemma4AssistantForCausalLM takes no cache of transformers"),
    ],
)
def test_refuses_what_cannot_be_followed(model_type, reason):
    """Before a weight is read."""
    assert reason in try_type(model_type)["refused"]


def test_refuses_damaged_checkpoints():
    """A tensor too few or too many is told by name."""
    from safetensors.torch import load_file, save_file

    with saved("opt", torch.float32) as (_, directory):
        path = directory / "model.safetensors"
        whole = load_file(path)
        name = "model.decoder.layers.1.fc1.weight"
        save_file({k: v for k, v in whole.items() if k != name}, path, {"format": "pt"})
        with pytest.raises(CheckpointError, match=f"lacks what makes {name}"):
            ollm.load(directory, device="cpu")
        save_file({**whole, "extra.weight": whole[name].clone()}, path, {"format": "pt"})
        with pytest.raises(CheckpointError, match=r"'extra\.weight'"):
            ollm.load(directory, device="cpu")


def test_a_model_that_sees_later_tokens():
    """A BERT that is no decoder."""
    with saved("bert", torch.float32) as (_, directory):
        path = directory / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "is_decoder": False}))
        with pytest.raises(UnsupportedError, match="sees later tokens too"):
            ollm.load(directory, device="cpu")
