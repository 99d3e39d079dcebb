"""Text as it comes, token by token."""

from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from ollm_core.text.detokenizer import Detokenizer


def test_characters_come_whole(smollm2):
    """Pieces add up to the text of all tokens, and none ends inside a character."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2, trust_remote_code=False)

    @settings(max_examples=50, deadline=None)
    @given(st.text(st.characters(exclude_categories=["Cs"])), st.integers(1, 3))
    def check(text, at_once):
        token_ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], 2]
        detokenizer = Detokenizer(tokenizer)
        pieces = [
            detokenizer.add(token_ids[i : i + at_once]) for i in range(0, len(token_ids), at_once)
        ]
        whole = tokenizer.decode(token_ids, skip_special_tokens=True)
        assert "".join(pieces) + detokenizer.finish() == whole
        if "\ufffd" not in text:
            assert not any(piece.endswith("\ufffd") for piece in pieces)

    check()


def test_what_is_left_comes_at_the_end(smollm2):
    """Half a character is kept back, and given as it is by `finish`."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2, trust_remote_code=False)
    (first, *_) = tokenizer("\U0001f9ff", add_special_tokens=False)["input_ids"]
    detokenizer = Detokenizer(tokenizer)
    assert detokenizer.add([first]) == ""
    assert detokenizer.finish() == "\ufffd"
