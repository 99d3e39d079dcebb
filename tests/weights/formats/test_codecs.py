"""Weight codecs: what they may say, what is refused, and what is counted."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

import ollm
from ollm_core import CheckpointError, EncodedTensor, OllmError, ParameterSource
from ollm_core.checkpoint.safetensors import open_checkpoint, read_config
from ollm_core.contracts.tensors import WeightPlan
from ollm_core.errors import PluginError
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


def test_what_a_codec_holds_is_reserved(tiny, with_codecs, ids):
    """The scratch memory that a codec declares counts against the budget."""
    negate(tiny, "model.layers.0.mlp.up_proj.weight")
    held = []
    for scratch in (0, 100_000):
        registry = with_codecs(lambda r, scratch=scratch: negative(r, scratch_bytes=scratch))
        with ollm.load(tiny, device="cpu", registry=registry) as model:
            held.append(model.weights.fixed_device_bytes)
    assert held[1] - held[0] == 100_000
