"""All of a GGUF file is in the model that is made of it, or named in one line; and the file may be
hostile.
"""

from __future__ import annotations

import functools
import json
import os
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf_files import write_gguf
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import ollm
from ollm_core import InputError, OllmError, UnsupportedError
from ollm_core.convert.gguf.header import GGUFHeader, read_header
from ollm_core.convert.gguf.importer import import_gguf
from ollm_core.convert.gguf.model import check_config, check_keys

pytest.importorskip("gguf")
pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries that do the reading

BASE = 10000.0
LLAMA3 = {"rope_type": "llama3", "rope_theta": BASE}


def llama3(factor, low, high, positions):
    """Rope parameters as those of Llama 3.1."""
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    return LLAMA3 | dict(zip(names, (factor, low, high, positions), strict=True))


PUBLISHED = llama3(32.0, 1.0, 4.0, 8192)
ROPES = {
    # parameters, what differs in the file, whether the same parameters must be found
    "none": ({"rope_type": "default", "rope_theta": BASE}, {}, True),
    "other base": ({"rope_type": "default", "rope_theta": 500000.0}, {}, True),
    "llama 3.2": (PUBLISHED | {"rope_theta": 500000.0}, {}, True),
    "as llama 3.1": (llama3(8.0, 1.0, 4.0, 64), {}, True),
    "odd ones": (llama3(5.5, 1.5, 3.75, 96), {}, False),
    "linear, as divisors": ({"rope_type": "linear", "factor": 4.0, "rope_theta": BASE}, {}, True),
    "linear, by keys": (
        {"rope_type": "linear", "factor": 4.0, "rope_theta": BASE},
        {
            "keys": {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
            "tensors": {"rope_freqs.weight": None},
        },
        True,
    ),
    "divisors of one": (
        {"rope_type": "default", "rope_theta": BASE},
        {"tensors": {"rope_freqs.weight": np.ones(16)}},
        True,
    ),
}


@pytest.mark.parametrize("case", ROPES)
def test_logits_of_the_original(make_llama, reference, ids, tmp_path, case):
    """An imported model gives the logits of the one that the file was made of, to the bit where its
    rope parameters have been found again.
    """
    parameters, changes, exact = ROPES[case]
    original = make_llama(head_dim=32, rope_parameters=parameters, rope_theta=None)
    model = LlamaForCausalLM.from_pretrained(original)
    out = tmp_path / "out"
    import_gguf(write_gguf(tmp_path / "x.gguf", model, **changes), out, "float32")
    found = json.loads((out / "config.json").read_text())["rope_parameters"]
    if exact:
        assert found == parameters
    prompt = ids(300)
    expected = reference(original, torch.float32).run(prompt, 64)
    with ollm.load(out, device="cpu", chunk_size=64, attention="exact") as opened:
        logits = opened(input_ids=prompt[None]).logits[0]
    assert torch.equal(logits, expected) if exact else torch.allclose(logits, expected, atol=1e-3)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """Makes a file of one small model, with changes, in an empty directory."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 120}
    config = AutoConfig.for_model("llama", **sizes, **heads, tie_word_embeddings=False)
    model = LlamaForCausalLM(config)

    def make(**changes) -> Path:
        return write_gguf(tmp_path_factory.mktemp("gguf") / "x.gguf", model, **changes)

    return make


NOT_ALL_USED = {
    # keys, tensors, the word that must be in the line
    "unknown key of the model": ({"llama.attention.new": 1.0}, {}, "llama.attention.new"),
    "key of nobody": ({"strange.key": 1}, {}, "strange.key"),
    "unknown key of the tokenizer": ({"tokenizer.ggml.new": 1}, {}, "tokenizer.ggml.new"),
    "charsmap": ({"tokenizer.ggml.precompiled_charsmap": [1, 2]}, {}, "precompiled_charsmap"),
    "logit scale": ({"llama.logit_scale": 2.0}, {}, "llama.logit_scale"),
    "attention scale": ({"llama.attention.scale": 0.3}, {}, "llama.attention.scale"),
    "window": ({"llama.attention.sliding_window": 16}, {}, "sliding_window"),
    "experts": ({"llama.expert_count": 4}, {}, "expert_count"),
    "another head size": ({"llama.attention.key_length": 16}, {}, "key_length"),
    "fewer rotated": ({"llama.rope.dimension_count": 4}, {}, "self_attn"),
    "yarn": ({"llama.rope.scaling.type": "yarn"}, {}, "yarn"),
    "yarn's own": ({"llama.rope.scaling.yarn_beta_fast": 2.0}, {}, "yarn_beta_fast"),
    "no KV heads": ({"llama.attention.head_count_kv": None}, {}, "head_count_kv"),
    "no epsilon": ({"llama.attention.layer_norm_rms_epsilon": None}, {}, "epsilon"),
    "vocabulary": ({"llama.vocab_size": 119}, {}, "x.gguf"),
    "another family": ({"general.architecture": "x\x1b[31m"}, {}, "x.gguf"),
    "LoRA": ({"general.type": "adapter"}, {}, "'adapter'"),
    "a part": ({"split.count": 3}, {}, "--merge"),
    "another way to split text": ({"tokenizer.ggml.pre": "new"}, {}, "'new'"),
    "divisors that nothing makes": (
        {},
        {"rope_freqs.weight": np.array([1.0, 5.0, 2.0, 7.0])},
        "rope_freqs",
    ),
    "divisors of another size": ({}, {"rope_freqs.weight": np.ones(3)}, "rope_freqs"),
    "divisors of zero": ({}, {"rope_freqs.weight": np.zeros(4)}, "divided"),
    "bias": ({}, {"blk.1.attn_q.bias": np.ones(32)}, "blk.1.attn_q.bias"),
    "unknown tensor": ({}, {"blk.0.attn_sinks.weight": np.ones(4)}, "attn_sinks"),
    "a layer too many": ({}, {"blk.2.ffn_norm.weight": np.ones(32)}, "blk.2.ffn_norm"),
    "a tensor is missing": ({}, {"blk.1.ffn_up.weight": None}, "layers.1.mlp.up_proj"),
    "no embedding": ({}, {"token_embd.weight": None}, "embed_tokens"),
    "another shape": ({}, {"blk.1.ffn_up.weight": np.ones((47, 32))}, "x.gguf"),
}


@pytest.mark.parametrize("case", NOT_ALL_USED)
def test_what_is_not_used_is_named(llama, tmp_path, case):
    """A key or tensor that would not be in the model, and a parameter that would be random."""
    keys, tensors, word = NOT_ALL_USED[case]
    file = llama(keys=keys, tensors=tensors)
    with pytest.raises(InputError) as refused:
        import_gguf(file, tmp_path / "out")
    assert word in str(refused.value)
    assert str(refused.value).isprintable()
    assert not list(tmp_path.iterdir())


def test_what_may_be_there(llama, tmp_path):
    """Keys that change nothing, and those that agree with the rest, do no harm."""
    keys = {
        "general.name": "x",
        "general.license": "y",
        "quantize.imatrix.file": "z",
        "llama.vocab_size": 120,
        "llama.attention.key_length": 8,
        "llama.rope.scaling.finetuned": True,
        "tokenizer.chat_template": "{{ messages }}",
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.eot_token_id": 5,
        "tokenizer.ggml.eom_token_id": 2,
        "tokenizer.ggml.fim_pad_token_id": 7,
    }
    import_gguf(llama(keys=keys), tmp_path / "out")
    generation = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert generation["eos_token_id"] == [2, 5]


def test_added_tokens(llama, tmp_path):
    """A file that wants a token before each text gets it."""
    import_gguf(llama(keys={"tokenizer.ggml.add_bos_token": True}), tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("a").input_ids[0] == 1


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["a", "Ġ1234"]),
        ("smollm", ["a", "Ġ", "1", "2", "3", "4"]),
        ("llama-bpe", ["a", "Ġ", "123", "4"]),
        ("qwen2", ["a", "Ġ", "1", "2", "3", "4"]),
        ("tekken", ["a", "Ġ", "1", "2", "3", "4"]),
        ("gpt-4o", ["a", "Ġ", "123", "4"]),
    ],
)
def test_text_is_split_as_the_file_says(llama, tmp_path, pre, pieces):
    """What `tokenizer.ggml.pre` names, whatever transformers makes of that name."""
    import_gguf(llama(keys={"tokenizer.ggml.pre": pre}), tmp_path / "out")
    backend = AutoTokenizer.from_pretrained(tmp_path / "out").backend_tokenizer
    assert [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str("a 1234")] == pieces
    assert backend.model.ignore_merges is (pre in ("llama-bpe", "tekken"))
    assert max(AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab().values()) == 119


@pytest.mark.parametrize("spaced", [None, True, False])
def test_sentencepiece(llama, tmp_path, spaced):
    """A vocabulary with scores: a token before each text; whether a space comes first is as the
    file says, or it is refused.
    """
    pieces = ["<unk>", "<s>", "</s>", "\u2581", "a", "b", "\u2581a", "ab"]
    pieces += [f"<{i}>" for i in range(112)]
    keys = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": None,
        "tokenizer.ggml.merges": None,
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": [-float(i) for i in range(120)],
        "tokenizer.ggml.token_type": [2, 3, 3] + [1] * 117,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_space_prefix": spaced,
    }
    try:
        import_gguf(llama(keys=keys), tmp_path / "out")
    except UnsupportedError as error:
        told = str(error)
    else:
        ids = AutoTokenizer.from_pretrained(tmp_path / "out")("ab").input_ids
        told = "add_space_prefix" if ids == ([1, 7] if spaced is False else [1, 6, 5]) else str(ids)
    assert "add_space_prefix" in told


def test_neighbours_are_not_read(llama, tmp_path):
    """Configs, code and adapters beside the file have no part in it."""
    file = llama()
    plant = {"auto_map": {"AutoConfig": "evil.C", "AutoTokenizer": ["evil.T", None]}}
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        (file.parent / name).write_text(json.dumps({**plant, "eos_token_id": 77}))
    (file.parent / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (file.parent / "evil.py").write_text("raise SystemExit(3)")
    import_gguf(file, tmp_path / "out")
    generation = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert generation["eos_token_id"] == 2
    assert "auto_map" not in (tmp_path / "out/tokenizer_config.json").read_text()


def header(num_tensors=0, num_keys=0, rest=b"", version=3):
    """The bytes of a file with these counts."""
    return struct.pack("<4sIQQ", b"GGUF", version, num_tensors, num_keys) + rest


def key(name, kind, value):
    """One key, its type and the bytes of its value."""
    return struct.pack(f"<Q{len(name)}sI", len(name), name.encode(), kind) + value


def entry(*shape, kind=0, offset=0):
    """One tensor."""
    numbers = struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
    return struct.pack("<Q", 1) + b"t" + numbers


HUGE = 1 << 60
HOSTILE = {
    "nothing": header(),
    "version": header(version=9),
    "byte order": header(version=3 << 24),
    "keys": header(num_keys=HUGE),
    "tensors": header(num_tensors=HUGE),
    "keys that are not there": header(num_keys=1000),
    "long name": header(0, 1, struct.pack("<Q", HUGE)),
    "long text": header(0, 1, key("a", 8, struct.pack("<Q", HUGE))),
    "long array": header(0, 1, key("a", 9, struct.pack("<IQ", 0, HUGE))),
    "array past the end": header(0, 1, key("a", 9, struct.pack("<IQ", 0, 1 << 20))),
    "texts past the end": header(0, 1, key("a", 9, struct.pack("<IQ", 8, 1 << 20))),
    "array of arrays": header(0, 1, key("a", 9, struct.pack("<IQ", 9, 1)) + bytes(64)),
    "unknown type": header(0, 1, key("a", 99, bytes(8))),
    "no text": header(0, 1, key("a", 8, struct.pack("<Q", 2) + b"\xff\xfe")),
    "key twice": header(0, 2, 2 * key("a", 0, b"\1")),
    "alignment": header(0, 1, key("general.alignment", 4, struct.pack("<I", 3))),
    "tensor past the end": header(1, 0, entry(4, 4)),
    "tensor too large": header(1, 0, entry(HUGE, HUGE, HUGE)),
    "tensor without shape": header(1, 0, entry()),
    "many dimensions": header(1, 0, entry(*[1] * 99)),
    "unknown kind": header(1, 0, entry(4, kind=77) + bytes(64)),
    "half a block": header(1, 0, entry(31, kind=8) + bytes(640)),
    "tensor twice": header(2, 0, 2 * entry(1) + bytes(640)),
    "offset": header(1, 0, entry(1, offset=1) + bytes(640)),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers(tmp_path, case):
    """Counts and sizes that lie are one line, and allocate nothing."""
    path = tmp_path / "x.gguf"
    path.write_bytes(HOSTILE[case])
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=r"x\.gguf") as refused:
            import_gguf(path, tmp_path / "out")
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()
    assert str(refused.value).isprintable()


def test_a_pipe(tmp_path):
    """What is no file is not waited for."""
    os.mkfifo(tmp_path / "x.gguf")
    with pytest.raises(InputError, match="regular"):
        import_gguf(tmp_path / "x.gguf", tmp_path / "out")


@functools.cache
def whole_file():
    """The bytes of a good header."""
    rest = key("general.architecture", 8, struct.pack("<Q", 5) + b"llama")
    rest += key("tokenizer.ggml.tokens", 9, struct.pack("<IQQ", 8, 1, 3) + b"abc")
    return header(1, 2, rest + entry(4, 2, kind=0)) + bytes(64)


@given(places=st.lists(st.integers(0, 200), max_size=4), values=st.binary(min_size=4, max_size=4))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_damaged_headers(tmp_path_factory, places, values):
    """Bytes changed anywhere: it is read, or it is one line."""
    raw = bytearray(whole_file())
    for place, value in zip(places, values, strict=False):
        raw[place % len(raw)] = value
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    path.write_bytes(raw)
    told = ""
    try:
        read_header(path)
    except OllmError as error:
        told = str(error)
    assert told.isprintable()


def test_keys_of_a_family_with_two_kinds_of_layers():
    """What transformers makes of the keys of Qwen3.5 agrees with them; and where it would not, that
    is told.
    """
    mapping = pytest.importorskip("transformers.integrations.gguf.gguf_config_mapping")
    values = {
        "block_count": 5, "nextn_predict_layers": 1, "context_length": 512,
        "embedding_length": 64, "feed_forward_length": 96, "full_attention_interval": 4,
        "attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": 16,
        "attention.value_length": 16, "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.freq_base": 1e6, "rope.dimension_count": 8, "ssm.conv_kernel": 4,
        "rope.dimension_sections": (2, 1, 1, 0), "ssm.state_size": 16, "ssm.group_count": 2,
        "ssm.time_step_rank": 4, "ssm.inner_size": 64,
    }  # fmt: skip
    metadata = {"general.architecture": "qwen35"}
    metadata |= {f"qwen35.{name}": value for name, value in values.items()}
    stated = mapping.get_gguf_config({**metadata, "tokenizer.ggml.tokens": 120}, ())
    config = AutoConfig.for_model(**stated)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    check_keys(GGUFHeader(Path("x"), metadata, {}))
    check_config(GGUFHeader(Path("x"), metadata, {}), model)
    for name in ("ssm.inner_size", "rope.dimension_sections", "block_count", "ssm.state_size"):
        changed = {**metadata, f"qwen35.{name}": 99}
        with pytest.raises(UnsupportedError, match=name):
            check_config(GGUFHeader(Path("x"), changed, {}), model)
