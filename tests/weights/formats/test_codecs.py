"""Weight codecs: what they may say, what is refused, and what is counted."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import ollm
from ollm_adapter_llama import LlamaAdapter
from ollm_core import CheckpointError, EncodedTensor, OllmError, ParameterSource, StoredForm
from ollm_core.checkpoint.safetensors import open_checkpoint, read_config
from ollm_core.contracts.tensors import WeightPlan
from ollm_core.errors import PluginError
from ollm_core.model.spec import inspect_model
from ollm_core.plugins.loader import Offer
from ollm_core.plugins.registry import Registry
from ollm_core.weights.formats.codecs import LogicalTensors

NORM = "model.norm.weight"
EMBEDDING = "model.embed_tokens.weight"


def offer(codec, name="test"):
    """A codec as a plugin would offer it."""
    return Offer("ollm_weight_codecs", name, codec, "test-plugin")


def negate(directory, *names):
    """Store tensors as their negatives, under NAME.neg."""
    path = directory / "model.safetensors"
    stored = load_file(path)
    for name in names:
        stored[f"{name}.neg"] = -stored.pop(name)
    save_file(stored, path, {"format": "pt", "codec": "negative"})


def negative(request, decode=torch.neg, **changes):
    """Undoes `negate`, where the metadata says so."""
    assert request.config["model_type"] == "llama"
    found = {}
    for name, info in request.tensors.items():
        if request.metadata[info.path].get("codec") == "negative" and name.endswith(".neg"):
            fields = {"tensors": (name,), "dtype": info.dtype, "shape": info.shape}
            fields |= {"decode": decode, **changes}
            found[name.removesuffix(".neg")] = EncodedTensor(**fields)
    return found


@pytest.fixture
def with_codecs():
    """A registry of what is installed, and these codecs."""

    def make(*codecs):
        registry = Registry.discover()
        for i, codec in enumerate(codecs):
            registry._offers["ollm_weight_codecs", f"c{i}"] = offer(codec, f"c{i}")
        return registry

    return make


def logits(directory, ids, registry=None, **options):
    with ollm.load(directory, device="cpu", registry=registry, **options) as model:
        return model(input_ids=ids[None]).logits[0]


def test_codec_is_found_by_metadata(tiny, with_codecs, ids):
    """A codec sees the file's metadata, and a checkpoint without it is left alone."""
    registry = with_codecs(negative)
    expected = logits(tiny, ids(20))
    assert torch.equal(logits(tiny, ids(20), registry), expected)
    negate(tiny, NORM, "lm_head.weight", "model.layers.0.mlp.up_proj.weight")
    with pytest.raises(CheckpointError, match="lacks tensor"):
        logits(tiny, ids(20))
    assert torch.equal(logits(tiny, ids(20), registry), expected)


def test_encoded_embedding_is_refused(tiny, with_codecs, ids):
    """Rows of the embedding are read as stored, so an encoded one is refused in one line."""
    negate(tiny, EMBEDDING)
    with pytest.raises(CheckpointError, match=r"input embedding .*embed_tokens\.weight\.neg"):
        logits(tiny, ids(20), with_codecs(negative))


@pytest.mark.parametrize(
    ("codec", "error", "words"),
    [
        (lambda r: 1 / 0, PluginError, "'c0' of test-plugin cannot be used: ZeroDivisionError"),
        (lambda r: [NORM], PluginError, "is a list, expected a Mapping"),
        (lambda r: {NORM: "x"}, PluginError, "EncodedTensor objects"),
        (lambda r: negative(r, tensors=("none",)), PluginError, "not stored"),
        (lambda r: negative(r, tensors=()), PluginError, "not stored"),
        (lambda r: negative(r, dtype="BF17"), PluginError, "unknown dtype 'BF17'"),
        (lambda r: negative(r, shape=(-1,)), PluginError, r"shape \(-1,\)"),
        (lambda r: negative(r, shape=(63,)), CheckpointError, r"shape \[63\].*needs \[64\]"),
        (lambda r: negative(r, lambda t: t[:3]), CheckpointError, r"decoded to .*\[3\]"),
        (lambda r: negative(r, lambda t: t.double()), CheckpointError, "float64"),
        (lambda r: negative(r, lambda t: t.no_such), CheckpointError, "cannot be decoded: Attrib"),
        (lambda r: {"lm_head.weight": negative(r)[NORM]}, CheckpointError, "both as it is and"),
    ],
)
def test_wrong_codec_is_refused(tiny, with_codecs, ids, codec, error, words):
    """Whatever a codec says that cannot be is one line that names it or the tensor."""
    negate(tiny, NORM)
    with pytest.raises(error, match=words) as caught:
        logits(tiny, ids(20), with_codecs(codec))
    assert isinstance(caught.value, OllmError)
    assert "\n" not in str(caught.value)


def test_two_codecs_that_claim_the_same(tiny, with_codecs, ids):
    """Two codecs for one tensor are refused, rather than one of them chosen."""
    negate(tiny, NORM)
    with pytest.raises(PluginError, match="so does another codec"):
        logits(tiny, ids(20), with_codecs(negative, negative))


def test_decoded_view_is_copied(tiny, with_codecs, ids):
    """A codec that returns what it was given does not keep the buffer that was read into."""
    expected = logits(tiny, ids(20))
    path = tiny / "model.safetensors"
    stored = load_file(path)
    save_file(
        {n + ".neg" * (n != EMBEDDING): t for n, t in stored.items()}, path, {"codec": "negative"}
    )
    registry = with_codecs(lambda request: negative(request, lambda stored: stored))
    assert torch.equal(logits(tiny, ids(20), registry), expected)
    tensors = LogicalTensors(
        open_checkpoint(tiny), read_config(tiny), registry.offers("ollm_weight_codecs")
    )
    plan = WeightPlan({NORM: ParameterSource((NORM,))})
    source = tensors.compose(plan, {}, torch.float32).parameters[NORM]
    raw = torch.ones(64)
    assert source.transform(raw).data_ptr() != raw.data_ptr()


def test_transform_gets_what_was_decoded(tiny):
    """Stored tensors are decoded first, then transformed; scratch covers what is held meanwhile."""
    q, k = (f"model.layers.0.self_attn.{p}_proj.weight" for p in "qk")
    negate(tiny, q)
    codec = offer(lambda request: negative(request, scratch_bytes=5))
    tensors = LogicalTensors(open_checkpoint(tiny), read_config(tiny), {"c": codec})
    assert {q, k} <= set(tensors.names)
    assert f"{q}.neg" not in tensors.names
    joined = ParameterSource((k, q), lambda *parts: torch.cat(parts), scratch_bytes=7)
    plan = WeightPlan({"joined": joined, "alone": ParameterSource((q,))})
    composed = tensors.compose(plan, {}, torch.float32).parameters
    assert composed["joined"].tensors == (k, f"{q}.neg")
    found = composed["joined"].transform(torch.ones(32, 64), torch.ones(64, 64))
    assert found.sum() == 32 * 64 - 64 * 64
    assert composed["joined"].scratch_bytes == 5 + 7 + 64 * 64 * 4
    assert composed["alone"].scratch_bytes == 5
    halved = tensors.compose(plan, {}, torch.bfloat16).parameters["alone"]
    assert halved.scratch_bytes == 5 + 64 * 64 * 4


def rowwise(request, row_changes=None, **changes):
    """As `negative`, and each row can be decoded alone."""
    found = {}
    for name, one in negative(request).items():
        row = replace(one, shape=one.shape[1:], scratch_bytes=3, **(row_changes or {}))
        found[name] = replace(one, row=row, scratch_bytes=50, **changes)
    return found


def test_a_row_is_decoded_alone(tiny):
    """A row of an encoded tensor is the row of what is stored for it, beside a plain one too."""
    q, k = (f"model.layers.0.self_attn.{p}_proj.weight" for p in "qk")
    negate(tiny, q)
    checkpoint, config = open_checkpoint(tiny), read_config(tiny)

    def forms(shape):
        return (StoredForm("F32", shape),)

    codec = offer(lambda request: rowwise(request, {"stored": forms}))
    tensors = LogicalTensors(checkpoint, config, {"c": codec})
    assert tensors.stored(q) == (f"{q}.neg",)
    assert tensors.stored(k) == (k,)
    both = ParameterSource((k, q), lambda *parts: torch.cat(parts), row=7)
    plan = WeightPlan({}, experts={"alone": (ParameterSource((q,), row=2),), "both": (both,)})
    shapes = {"alone": (1, 64), "both": (1, 128)}
    made = tensors.compose(plan, shapes, torch.bfloat16).experts
    ((alone,), (both,)) = made["alone"], made["both"]
    assert (alone.tensors, alone.row, alone.makes) == ((f"{q}.neg",), 2, "F32")
    assert (alone.scratch_bytes, both.scratch_bytes) == (3, 3 + 64 * 4)
    assert alone.stored == (StoredForm("F32", (64,)),)
    assert (both.tensors, both.row) == ((k, f"{q}.neg"), 7)
    assert both.stored == (StoredForm("F32", (64,)),) * 2
    assert torch.equal(alone.transform(torch.arange(64.0)), -torch.arange(64.0))
    assert both.transform(torch.ones(64), torch.ones(64)).sum() == 0


def test_a_row_of_what_decodes_whole_is_refused(tiny):
    """A codec that says nothing of rows is not asked for one."""
    q = "model.layers.0.self_attn.q_proj.weight"
    negate(tiny, q)
    tensors = LogicalTensors(open_checkpoint(tiny), read_config(tiny), {"c": offer(negative)})
    plan = WeightPlan({}, experts={"e": (ParameterSource((q,), row=2),)})
    with pytest.raises(CheckpointError, match=f"e.0. is row 2 of {q}, which is encoded as a whole"):
        tensors.compose(plan, {"e": (1, 64)}, torch.float32)


@pytest.mark.parametrize(
    "changes", [{"shape": (1, 64)}, {"dtype": "F16"}, {"tensors": ("model.norm.weight",)}]
)
def test_a_row_that_is_none_is_refused(tiny, changes):
    """Rows are of the same tensors and dtype, without the first dimension."""
    negate(tiny, "model.layers.0.self_attn.q_proj.weight")
    codec = offer(
        lambda r: {
            name: replace(one, row=replace(one.row, **changes)) for name, one in rowwise(r).items()
        }
    )
    with pytest.raises(PluginError, match="and its row to"):
        LogicalTensors(open_checkpoint(tiny), read_config(tiny), {"c": codec})


def test_stored_tensors_are_held_against_what_a_codec_says(tiny, with_codecs, ids):
    """Whatever shape a codec takes from a header, the parameter's decides."""
    negate(tiny, NORM)
    codec = functools.partial(
        negative, shape=(63,), stored=lambda shape: (StoredForm("F16", shape),)
    )
    with pytest.raises(CheckpointError, match=r"is F32 \[64\], .*needs F16 \[64\]"):
        logits(tiny, ids(20), with_codecs(codec))


def _float(tensor):
    return tensor.float()


class Halved:
    """A form that config.json states: norms are stored in float16."""

    method = "halved"

    def __call__(self, request):
        if request.config.get("quantization_config") != {"quant_method": self.method}:
            return {}
        return {
            name.removesuffix(".half"): EncodedTensor(
                (name,), "F32", info.shape, torch.Tensor.float
            )
            for name, info in request.tensors.items()
            if name.endswith(".half")
        }

    def describe(self, config, tensors):
        assert config["quantization_config"] == {"quant_method": self.method}
        return {
            f"{name}.half" if len(form.shape) == 1 else name: replace(form, dtype="F16")
            if len(form.shape) == 1
            else form
            for name, form in tensors.items()
        }


class HalvedLlama(LlamaAdapter):
    """A family that is published so."""

    quantizations = ("halved",)


@pytest.mark.parametrize("described", [True, False])
def test_a_form_that_config_states_is_planned_and_run(tiny, described):
    """With its files and without them: the same tensors, at the same places."""
    path = tiny / "model.safetensors"
    config = {**read_config(tiny), "quantization_config": {"quant_method": "halved"}}
    config.pop("dtype", None)
    stored = load_file(path)
    for name in [name for name, tensor in stored.items() if tensor.dim() == 1]:
        stored[f"{name}.half"] = stored.pop(name).half()
    save_file(stored, path, {"format": "pt"})
    checkpoint = None if described else open_checkpoint(tiny)
    spec = inspect_model(
        HalvedLlama(), config, checkpoint, {"h": offer(Halved())},
        dtype="float32" if described else "auto", device=torch.device("cpu"), where=tiny,
    )  # fmt: skip
    held = {info.name: (info.dtype, info.shape) for info in spec.checkpoint.tensors.values()}
    assert held == {
        name: ("F16" if name.endswith(".half") else "F32", tuple(tensor.shape))
        for name, tensor in stored.items()
    }
    assert spec.units.norm.tensors[0].name == "model.norm.weight.half"
    assert spec.dtype == torch.float32


def test_what_a_codec_holds_is_reserved(tiny, with_codecs, ids):
    """The scratch memory that a codec declares counts against the budget."""
    negate(tiny, "model.layers.0.mlp.up_proj.weight")
    held = []
    for scratch in (0, 100_000):
        registry = with_codecs(lambda r, scratch=scratch: negative(r, scratch_bytes=scratch))
        with ollm.load(tiny, device="cpu", registry=registry) as model:
            held.append(model.weights.fixed_device_bytes)
    assert held[1] - held[0] == 100_000
