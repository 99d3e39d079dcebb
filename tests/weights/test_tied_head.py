"""A tied head whose own tensor is stored too, against what transformers makes of it."""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import ollm
from ollm_adapter_llama import LlamaAdapter
from ollm_core import CheckpointError, EncodedTensor, ReadError
from ollm_core.checkpoint.safetensors import open_checkpoint, read_config
from ollm_core.convert.compress import convert
from ollm_core.model.spec import inspect_model
from ollm_core.plugins.loader import Offer
from ollm_core.plugins.registry import Registry
from ollm_core.weights.tied_head import _equal

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def rewrite(directory, change):
    """Store the weights again after `change(tensors)`."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def set_head(make):
    """A change that stores a head made from the embedding."""
    return lambda tensors: tensors.update({HEAD: make(tensors[EMBEDDING])})


def differs_at(*places):
    """Makes a tensor that differs in these elements alone."""

    def make(table):
        head = table.clone()
        head.view(-1)[list(places)] += 1
        return head

    return make


def is_tied(directory, adapter=None, dtype="auto", codecs=None):
    """Whether core takes the embedding's tensor for the head."""
    config = read_config(directory)
    units = inspect_model(
        adapter or LlamaAdapter(),
        config,
        open_checkpoint(directory),
        codecs or {},
        dtype=dtype,
        device=torch.device("cpu"),
        where=directory,
        bare=True,
    ).units
    return {t.offset for u in units.head for t in u.tensors} >= {units.embedding.offset}


def theirs(directory, dtype="auto"):
    """Whether transformers ties them, and its model."""
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, attn_implementation="eager"
    )
    tied = model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    return tied, model


CASES = {
    # the dtype that is stored, the head made from the embedding, the dtype to compute in, tied
    "none": (F32, None, "auto", True),
    "equal": (F32, torch.clone, "auto", True),
    "last element": (F32, differs_at(-1), "auto", False),
    "first element": (BF16, differs_at(0), "auto", False),
    "equal in float32": (BF16, lambda table: table.float(), "bfloat16", True),
    "equal once rounded": (F32, lambda table: table.bfloat16(), "bfloat16", True),
    "other once not rounded": (F32, lambda table: table.bfloat16(), "float32", False),
    "minus zero": (F32, lambda t: torch.where(t == 0, -t, t), "auto", True),
    "not a number": (F32, lambda t: t.index_fill(0, torch.tensor(3), torch.nan), "auto", False),
}


@pytest.mark.parametrize("case", CASES)
def test_as_transformers(make_llama, case):
    """Tied or not as transformers decides it, whatever the dtypes."""
    stored, make, dtype, expected = CASES[case]
    directory = make_llama(stored, tie_word_embeddings=True)
    rewrite(directory, lambda ts: ts[EMBEDDING][0].zero_())
    if make is not None:
        rewrite(directory, set_head(make))
    assert is_tied(directory, dtype=dtype) is expected
    assert theirs(directory, dtype)[0] is expected


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_another_head_is_used(make_llama, reference, ids, dtype):
    """Logits of a model that is declared tied, with another head stored, are transformers'."""
    directory = make_llama(dtype, tie_word_embeddings=True)
    rewrite(directory, set_head(lambda table: table.flip(0)))
    prompt = ids(40)
    expected = reference(directory, dtype).run(prompt, 64)
    with ollm.load(directory, device="cpu", chunk_size=64, attention="exact") as model:
        assert torch.equal(model(input_ids=prompt[None]).logits[0], expected)


def test_an_equal_head_is_held_once(make_llama, ids):
    """A second copy in the file takes no memory."""
    directory = make_llama(tie_word_embeddings=True)
    with ollm.load(directory, device="cpu") as model:
        expected = model.stats.resident_bytes
    rewrite(directory, set_head(torch.clone))
    with ollm.load(directory, device="cpu") as model:
        assert model.stats.resident_bytes == expected


def test_a_head_alone(make_llama, reference, ids):
    """A tied checkpoint that holds the head and no embedding: it is both, as for transformers."""
    directory = make_llama(tie_word_embeddings=True)
    rewrite(directory, lambda tensors: tensors.update({HEAD: tensors.pop(EMBEDDING)}))
    prompt = ids(40)
    expected = reference(directory, F32).run(prompt, 64)
    with ollm.load(directory, device="cpu", chunk_size=64, attention="exact") as model:
        assert torch.equal(model(input_ids=prompt[None]).logits[0], expected)


def test_another_shape(make_llama):
    """A head of another shape is refused, as transformers refuses it."""
    directory = make_llama(tie_word_embeddings=True)
    rewrite(directory, set_head(lambda table: table[:7].clone()))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight has shape \[7, 64\]"):
        is_tied(directory)


class ByName(LlamaAdapter):
    """Says itself what a checkpoint holds: the head is tied, its own tensor under another name."""

    def weights(self, config, tensor_names):
        names = {"output.weight" if name == HEAD else name for name in tensor_names}
        foreign = names & {"output.weight"}
        tied = config["tie_word_embeddings"]
        plan = super().weights({**config, "tie_word_embeddings": True}, names - foreign)
        if tied or not foreign:
            return replace(plan, ignored=plan.ignored | {HEAD} if foreign else plan.ignored)
        head = replace(plan.parameters[HEAD], tensors=(HEAD,))
        return replace(plan, parameters={**plan.parameters, HEAD: head})


class Forgets(LlamaAdapter):
    """Does not say that it leaves the head's own tensor out, whatever config.json says."""

    def weights(self, config, tensor_names):
        names = set(tensor_names) - {HEAD}
        return super().weights({**config, "tie_word_embeddings": True}, names)


@pytest.mark.parametrize("adapter", [ByName(), Forgets()])
def test_adapters_with_weights_of_their_own(make_llama, adapter):
    """The comparison is core's: an adapter need not know of it."""
    directory = make_llama(tie_word_embeddings=True)
    assert is_tied(directory, adapter)
    rewrite(directory, set_head(torch.clone))
    assert is_tied(directory, adapter)
    rewrite(directory, set_head(differs_at(100)))
    assert not is_tied(directory, adapter)


def test_an_encoded_head(make_llama, ids):
    """A head that a codec makes is used as it is stored, equal or not."""
    directory = make_llama(tie_word_embeddings=True)
    with ollm.load(directory, device="cpu") as model:
        expected = model(input_ids=ids(20)[None]).logits
    rewrite(directory, lambda ts: ts.update({f"{HEAD}.neg": -ts[EMBEDDING]}))

    def negative(request):
        info = request.tensors[f"{HEAD}.neg"]
        return {HEAD: EncodedTensor((info.name,), info.dtype, info.shape, torch.neg)}

    registry = Registry.discover()
    offer = Offer("ollm_weight_codecs", "negative", negative, "test-plugin")
    registry._offers["ollm_weight_codecs", "negative"] = offer
    assert not is_tied(directory, codecs={"negative": offer})
    with ollm.load(directory, device="cpu", registry=registry) as model:
        assert torch.equal(model(input_ids=ids(20)[None]).logits, expected)


def test_convert(make_llama, ids, tmp_path):
    """A converted checkpoint keeps the head that differs."""
    directory = make_llama(BF16, tie_word_embeddings=True)
    rewrite(directory, set_head(lambda table: table.flip(0)))
    convert(directory, tmp_path / "out", min_bytes=1024)
    with ollm.load(directory, device="cpu") as model:
        expected = model(input_ids=ids(20)[None]).logits
    with ollm.load(tmp_path / "out", device="cpu") as model:
        assert torch.equal(model(input_ids=ids(20)[None]).logits, expected)


def test_a_plan_knows(make_llama):
    """`ollm plan` on a directory counts the tensor that a run would use."""
    directory = make_llama(BF16, tie_word_embeddings=True)
    peaks = []
    for change in (set_head(torch.clone), set_head(differs_at(0))):
        rewrite(directory, change)
        peaks.append(ollm.plan(directory, device="cpu", device_memory="1GB").device_peak_bytes)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    untied = ollm.plan(directory, device="cpu", device_memory="1GB").device_peak_bytes
    assert peaks[1] == untied != peaks[0]


@pytest.mark.parametrize("stored", [(F32, F32), (BF16, F32), (F16, BF16)])
def test_large_ones_are_compared_in_pieces(tmp_path, stored):
    """Memory does not grow with the tensors; the last element counts; a cut file is a ReadError."""
    ones = torch.ones(4000, 1500)
    other = ones.clone()
    other[-1, -1] = 2
    tensors = {"a": ones.to(stored[0]), "b": ones.clone().to(stored[1]), "c": other.to(stored[1])}
    save_file(tensors, tmp_path / "model.safetensors")
    infos = open_checkpoint(tmp_path).tensors
    tracemalloc.start()
    try:
        assert _equal(infos["a"], infos["b"], F32)
        assert not _equal(infos["a"], infos["c"], F32)
        assert tracemalloc.get_traced_memory()[1] < 10 << 20
    finally:
        tracemalloc.stop()
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ReadError, match="ends within"):
        _equal(infos["a"], infos["b"], F32)
