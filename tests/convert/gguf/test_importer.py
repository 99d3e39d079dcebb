"""A GGUF file becomes a safetensors model, whole or not at all."""

import json
from pathlib import Path

import numpy as np
import pytest

from ollm_core import InputError, UnsupportedError
from ollm_core.checkpoint.safetensors import open_checkpoint
from ollm_core.convert.gguf.importer import import_gguf

gguf = pytest.importorskip("gguf")
pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries that do the reading

HIDDEN, HEADS, KV_HEADS, FFN, LAYERS = 64, 4, 2, 96, 2
CHAT = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory) -> Path:
    """A Llama of two layers with a byte-level tokenizer and a chat template."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    letters = [chr(code) for code in range(33, 127)]
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *letters, "ab"]
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHAT)
    generator = np.random.default_rng(0)
    kv_size = HIDDEN // HEADS * KV_HEADS
    shapes = {"token_embd": (len(tokens), HIDDEN), "output_norm": (HIDDEN,)}
    for layer in range(LAYERS):
        shapes |= {
            f"blk.{layer}.attn_norm": (HIDDEN,),
            f"blk.{layer}.attn_q": (HIDDEN, HIDDEN),
            f"blk.{layer}.attn_k": (kv_size, HIDDEN),
            f"blk.{layer}.attn_v": (kv_size, HIDDEN),
            f"blk.{layer}.attn_output": (HIDDEN, HIDDEN),
            f"blk.{layer}.ffn_norm": (HIDDEN,),
            f"blk.{layer}.ffn_gate": (FFN, HIDDEN),
            f"blk.{layer}.ffn_up": (FFN, HIDDEN),
            f"blk.{layer}.ffn_down": (HIDDEN, FFN),
        }
    for name, shape in shapes.items():
        tensor = generator.standard_normal(shape).astype(np.float32)
        writer.add_tensor(f"{name}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_import(tiny_gguf, tmp_path):
    """The result opens: tied head, stopping token, chat template, the dtype that was asked."""
    from transformers import AutoTokenizer

    out = tmp_path / "models" / "tiny"
    assert import_gguf(tiny_gguf, out, "float32") is None
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["tie_word_embeddings"]
    assert config["num_hidden_layers"] == LAYERS
    assert "quantization_config" not in config
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == 2
    tensors = open_checkpoint(out).tensors
    assert "lm_head.weight" not in tensors
    assert {tensor.dtype for tensor in tensors.values()} == {"F32"}
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.eos_token_id == 2
    assert tokenizer("abc").input_ids == [97, tokenizer.convert_tokens_to_ids("c")]
    chat = [{"role": "user", "content": "ab"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "<|im_start|>ab<|im_end|>"
    assert [item.name for item in out.parent.iterdir()] == ["tiny"]


def test_what_is_there_is_kept(tiny_gguf, tmp_path):
    """A taken name is refused; with force it is moved aside, never deleted."""
    out = tmp_path / "tiny"
    out.mkdir()
    (out / "notes").write_text("mine")
    with pytest.raises(InputError, match="exists"):
        import_gguf(tiny_gguf, out)
    aside = import_gguf(tiny_gguf, out, force=True)
    assert aside == tmp_path / "tiny.old"
    assert (aside / "notes").read_text() == "mine"
    assert {tensor.dtype for tensor in open_checkpoint(out).tensors.values()} == {"BF16"}


@pytest.mark.parametrize("kept", [0, 3, 4, 200, 0.5, -1])
def test_bad_files(tiny_gguf, tmp_path, kept):
    """A file that is no GGUF, or is cut anywhere, is one InputError and leaves nothing behind."""
    data = tiny_gguf.read_bytes()
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(data[: int(kept * len(data)) if isinstance(kept, float) else kept])
    with pytest.raises(InputError, match=r"bad\.gguf"):
        import_gguf(bad, tmp_path / "out")
    assert [item.name for item in tmp_path.iterdir()] == ["bad.gguf"]


def test_bad_arguments(tiny_gguf, tmp_path, monkeypatch):
    """A missing file, an unknown dtype and a missing package each say so."""
    with pytest.raises(InputError, match="cannot read"):
        import_gguf(tmp_path / "gone.gguf", tmp_path / "out")
    with pytest.raises(InputError, match="int4"):
        import_gguf(tiny_gguf, tmp_path / "out", "int4")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match=r"pip install 'ollm-core\[gguf\]'"):
        import_gguf(tiny_gguf, tmp_path / "out")


pytest.importorskip("gguf")


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
