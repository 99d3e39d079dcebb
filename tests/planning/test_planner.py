"""Plans: numbers that add up, limits that are exact, and errors of one line."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

import ollm
from ollm_adapter_gpt_oss import GptOssAdapter
from ollm_adapter_llama import LlamaAdapter
from ollm_core import InputError, UnknownModelError
from ollm_core.errors import DeviceError
from ollm_core.plugins.registry import Registry
from ollm_core.values import parse_tokens

pytestmark = pytest.mark.usefixtures("home")

GPU = {"device": "cuda", "device_memory": "8GB", "host_memory": "16GB"}
GPT_OSS_20B = {
    key: value
    for key, value in GptOssAdapter().catalog()[0].config.items()
    if key != "quantization_config"
} | {"dtype": "bfloat16"}
"""Of the model as it is before it is quantised."""


def check(plan):
    """What holds of every plan."""
    assert sum(plan.device_bytes.values()) == plan.device_peak_bytes
    assert sum(plan.host_bytes.values()) == plan.host_peak_bytes
    assert all(size > 0 for size in (*plan.device_bytes.values(), *plan.host_bytes.values()))
    if plan.fits:
        assert plan.device_peak_bytes <= plan.device_memory
        assert plan.host_peak_bytes <= plan.host_memory
        assert plan.largest_context >= plan.context
        assert not plan.reason
    else:
        assert plan.reason
        assert plan.hint
        assert plan.largest_context < plan.context
    assert plan.limited_by in ("disk", "bus", "memory", "compute")
    assert plan.prefill_seconds > 0 < plan.tokens_per_second
    assert len(plan.changes) <= 3
    json.dumps(plan.fields())
    return plan


CATALOG = [
    (entry.id, entry)
    for adapter, entry, _ in Registry.discover().catalog()
    if adapter and entry.config.get("model_type") in adapter.model_types
]
"""Those whose family an adapter names."""


@pytest.mark.parametrize(
    ("model", "context", "published"),
    [
        ("gpt-oss-20B", 10_000, 7_300_000_000),
        ("gpt-oss-20B", 100_000, 8_000_000_000),
        ("qwen3-next-80B", 10_000, 7_500_000_000),
        ("qwen3-next-80B", 50_000, 7_500_000_000),
    ],
)
def test_large_mixtures_take_less_than_the_predecessor(model, context, published):
    """In less device memory than its published figure for the row, or than 8 GB where it has none;
    a tenth of that would still do.
    """
    plan = ollm.plan(model, **{**GPU, "device_memory": published - 1}, context=context)
    check(plan)
    assert plan.fits
    assert plan.smallest_device_bytes < published / 10


@pytest.mark.parametrize(("model_id", "entry"), CATALOG, ids=[name for name, _ in CATALOG])
def test_every_known_model_can_be_planned(model_id, entry, tmp_path, monkeypatch):
    """By id, without files: its size is that of the catalog, and it fits 8 GB at its longest, up to
    100,000 tokens, with a host that has room for two layers of the largest.
    """
    monkeypatch.chdir(tmp_path)  # where no ./models is
    context = min(100_000, entry.config["max_position_embeddings"])
    found = check(ollm.plan(model_id, context=context, **{**GPU, "host_memory": "17GB"}))
    assert found.fits
    assert not found.from_files
    # What a checkpoint holds and the model does not use (a layer that drafts) is not planned.
    assert 0.97 * entry.weight_bytes < found.weight_bytes <= entry.weight_bytes


@pytest.mark.parametrize("context", ["10k", "100k"])
def test_a_mixture_of_full_size(tmp_path, stacked_gpt_oss, context):
    """gpt-oss-20b, not quantised, from a lone config.json, in 8 GB."""
    config = tmp_path / "anything.json"
    config.write_text(json.dumps(GPT_OSS_20B))
    registry = Registry.of(stacked_gpt_oss)
    found = check(ollm.plan(config, context=context, registry=registry, **GPU))
    assert found.fits
    place = found.placement
    assert place["experts"] == 24 * 32
    assert 0 < place["device_experts"] + place["host_experts"] < 24 * 32
    # In full layers all tokens, in the others a window: 12 of each, 8 heads of 64, twice 2 bytes.
    full = 12 * parse_tokens(context) * 8 * 64 * 4
    assert found.kv_bytes == full + 12 * 128 * 8 * 64 * 4
    (more,) = [change for change in found.changes if change.option == "--host-memory 32000MB"]
    assert more.tokens_per_second > found.tokens_per_second


@pytest.fixture
def stacked_gpt_oss():
    """Adapter of a family whose experts are rows of stacked tensors."""
    from families import GptOss

    from ollm_core import ParameterSource

    class Stacked(GptOss):
        def layout(self, config):
            return replace(super().layout(config), experts="mlp.experts")

        def experts(self, config, parameter):
            if ".mlp.experts." not in parameter:
                return ()
            number = config["num_local_experts"]
            return [ParameterSource((parameter,), row=i) for i in range(number)]

    return Stacked()


def test_what_does_not_fit_says_what_would(tiny):
    """The budgets that are named do, and a byte less does not; so does the context."""
    registry = Registry.of(LlamaAdapter())
    options = {"device": "cpu", "kv": "device", "registry": registry, "max_new_tokens": 8}
    tight = check(ollm.plan(tiny, context=4000, device_memory=3_000_000, **options))
    assert not tight.fits
    assert tight.hint == (
        f"allow --device-memory {-(-tight.device_peak_bytes // 10**6)}MB, "
        f"or a context of at most {tight.largest_context} tokens"
    )
    least = tight.smallest_device_bytes
    assert check(ollm.plan(tiny, context=4000, device_memory=least, **options)).fits
    assert not ollm.plan(tiny, context=4000, device_memory=least - 1, **options).fits
    largest = tight.largest_context
    assert largest
    assert check(ollm.plan(tiny, context=largest, device_memory=3_000_000, **options)).fits
    longer = largest + 256
    assert not ollm.plan(tiny, context=longer, device_memory=3_000_000, **options).fits
    others = {"--context 2000": {"context": 2000}, "--kv host": {"kv": "host"}}
    others |= {"--kv disk": {"kv": "disk"}, "--device-memory 6MB": {"device_memory": "6MB"}}
    for change in tight.changes:  # the fastest first
        given = {"context": 4000, "device_memory": 3_000_000, **options, **others[change.option]}
        assert check(ollm.plan(tiny, **given)).fits, change.option
    assert tight.changes[0].option == "--context 2000"
    assert check(ollm.plan(tiny, context=4000, device_memory="6MB", **options)).fits


def test_the_least_host_memory_of_many_layers(make_llama):
    """Each of which takes its KV by itself: what is named is enough for all."""
    model = make_llama(num_hidden_layers=24)
    options = {"device": "cpu", "kv": "host", "context": 2000}
    tight = check(ollm.plan(model, host_memory=1, **options))
    assert not tight.fits
    assert check(ollm.plan(model, host_memory=tight.smallest_host_bytes, **options)).fits
    assert not ollm.plan(model, host_memory=tight.smallest_host_bytes - 1, **options).fits


def test_no_context_fits(tiny):
    """Where nothing does, only memory is asked for."""
    found = check(ollm.plan(tiny, device="cpu", device_memory="10kB", context=1000))
    assert found.largest_context == 0
    assert "context" not in found.hint


def test_files_and_config_alone_agree(tiny, tmp_path):
    """A directory with weights, one without, and the config.json: the same plan."""
    options = {"device": "cpu", "device_memory": "1MB", "host_memory": "9MB", "context": 700}
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text((tiny / "config.json").read_text())
    plans = [ollm.plan(where, **options) for where in (tiny, bare, tiny / "config.json")]
    assert [found.from_files for found in plans] == [True, False, False]
    same = [replace(found, model="", from_files=False, planned_from="") for found in plans]
    assert same[0] == same[1] == same[2]


def test_more_memory_never_hurts():
    """A bigger budget reads less from disk."""
    reads = [
        ollm.plan(
            "llama3-8B-chat", device="cuda", device_memory=f"{size}GB", host_memory="4GB"
        ).bytes_read_per_token
        for size in (2, 20)
    ]
    assert reads == sorted(reads, reverse=True)
    assert reads[-1] == 0 < reads[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device_memory": "8"}, "'8' is not a memory size"),
        ({"device_memory": "-8GB"}, "'-8GB' is not a memory size"),
        ({"host_memory": -1}, "-1 is not a memory size"),
        ({"context": "long"}, "'long' is not a number of tokens"),
        ({"context": 0}, "'0' is not a number of tokens"),
        ({"context": "-5"}, "'-5' is not a number of tokens"),
        ({"context": "200k"}, "past the model's 131072 positions"),
        ({"context": 256}, "leaves no room for a prompt"),
        ({"batch": 0}, "batch is 0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"chunk_size": 0}, "chunk_size is 0"),
        ({"kv": "tape"}, "kv is 'tape'"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"attention": "sparse"}, "attention is 'sparse'"),
    ],
)
def test_bad_input_is_one_line(options, message):
    """What was wrong, and a hint."""
    with pytest.raises(InputError) as caught:
        ollm.plan("llama3-8B-chat", **{"device": "cpu"} | options)
    assert message in caught.value.message
    assert caught.value.hint
    assert "\n" not in str(caught.value)


def test_models_that_cannot_be_planned(tmp_path):
    """Unknown ids, types, devices and places."""
    with pytest.raises(UnknownModelError, match="did you mean llama3-8B-chat"):
        ollm.plan("llama3-8B-chats")
    (tmp_path / "config.json").write_text('{"model_type": "mambo"}')
    for where in (tmp_path, tmp_path / "config.json"):
        with pytest.raises(UnknownModelError, match="no adapter opens model_type 'mambo'"):
            ollm.plan(where)
    with pytest.raises(InputError, match="no such file"):
        ollm.plan(tmp_path / "other.json")
    with pytest.raises(InputError, match="there is no directory"):
        ollm.plan("./some/where")
    with pytest.raises(DeviceError):
        ollm.plan("llama3-8B-chat", device="tpu")
