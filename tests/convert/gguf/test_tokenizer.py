"""Tokenizers of GGUF files split text as the file says."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from ollm_core import UnsupportedError
from ollm_core.convert.gguf.importer import import_gguf

pytest.importorskip("gguf")
pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries that do the reading


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
