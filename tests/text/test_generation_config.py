"""generation_config.json: every field of its kind, and nothing that changes what a run is."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig

import ollm
from ollm_core import ConfigError
from ollm_core.cli.main import main
from ollm_core.text.generation_config import (
    _FIELDS,
    MAX_BYTES,
    RUN_FIELDS,
    for_run,
    read_generation_config,
)

WRONG = {
    "an integer": ["x", 1.5, True, [1], {}, 10**30],
    "a number": ["x", True, [1.0], {}, float("nan"), float("inf"), 10**30],
    "a number above 0": ["x", 0, -1.5, True, [1.0]],
    "true or false": ["true", 1, [True], {}],
    "true, false or text": [1, [True], {}],
    "a token id or a list of them": ["2", 2.5, True, [2, "x"], [[2]], {}, 10**30, [2, 10**30]],
    "a list of token ids": [2, "2", [2.5], [None], {}],
    "a list of lists of token ids": [2, [2], [[]], [[-1]], [["x"]], {}],
    "a list of token ids with a number each": [2, [[2]], [[[2], "x"]], [[["x"], 1.0]]],
    "a list of two numbers": [2, [1], [1, "x"], [1, 2, 3]],
    "text": [1, [], ["x"], True, "", "x" * 257],
}
DROPPED = {
    "cache_implementation": "static",
    "cache_config": {"backend": "quanto"},
    "max_cache_len": 4,
    "use_cache": False,
    "compile_config": {},
    "prefill_chunk_size": 1,
    "continuous_batching_config": {},
    "watermarking_config": {"bias": 1.0},
    "penalty_alpha": 0.6,
    "num_beam_groups": 2,
    "diversity_penalty": 1.0,
    "dola_layers": "high",
    "constraints": [1],
    "force_words_ids": [[1]],
    "low_memory": True,
    "custom_generate": "custom_generate",
    "auto_map": {"GenerationConfig": "canary.Canary"},
    "validate": 7,
}
CHANGES = {
    "return_dict_in_generate": True, "output_scores": True, "output_hidden_states": True,
    "output_attentions": True, "output_logits": True, "num_return_sequences": 2, "num_beams": 4,
    "max_length": 3, "max_new_tokens": 1, "min_length": 9, "min_new_tokens": 9, "max_time": 0.0,
    "prompt_lookup_num_tokens": 4, "assistant_confidence_threshold": 0.4, "guidance_scale": 1.5,
    "renormalize_logits": True, "token_healing": True, "do_sample": True, "temperature": 0.0,
    "top_k": -1, "early_stopping": "never", "forced_bos_token_id": 3, "forced_eos_token_id": 3,
    "sequence_bias": [[[5], 10.0]], "exponential_decay_length_penalty": [1, 2.0],
    "encoder_repetition_penalty": 2.0, "num_assistant_tokens_schedule": "constant",
}  # fmt: skip


@pytest.fixture
def say(tmp_path):
    """Writes the file and reads it."""

    def read(fields):
        text = fields if isinstance(fields, str) else json.dumps(fields)
        (tmp_path / "generation_config.json").write_text(text)
        return read_generation_config(tmp_path, {})

    return read


def test_wrong_kinds(say):
    """Every field of a wrong kind is refused with the file, the field and what it should be."""
    for kind, _, names in _FIELDS:
        wrong = WRONG.get(kind, [1, [1], "", ["a", ""], ["a"] * 65, {}, [["a"]]])
        for name in names.split():
            assert say({name: None}) is not None
            for value in wrong:
                if value == []:
                    continue
                with pytest.raises(ConfigError, match=f"generation_config.json: `{name}` must be"):
                    say({name: value})


def test_every_field_of_transformers_is_decided():
    """Each is of a kind, or is left out on purpose; a new one of transformers is seen here."""
    known = {name for _, _, names in _FIELDS for name in names.split()}
    kept_out = {*DROPPED, "disable_compile", "transformers_version", "use_mtp", "speculation_type"}
    theirs = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert theirs - known <= kept_out
    assert set(RUN_FIELDS) <= known


def test_what_is_not_ours_is_left_out(say):
    """Caches, compilation and decoding that transformers has moved away do not come in, nor do
    names that no GenerationConfig has.
    """
    assert say(DROPPED).to_dict() == GenerationConfig().to_dict()
    assert callable(say(DROPPED).validate)


def test_for_run(say):
    """A run hears of ends and of tokens not to say, and of nothing else."""
    said = {
        "eos_token_id": [2, 5], "bos_token_id": 1, "pad_token_id": -1, "stop_strings": "end",
        "repetition_penalty": 2, "no_repeat_ngram_size": 3, "bad_words_ids": [[4, 5]],
        "suppress_tokens": [6], "begin_suppress_tokens": [7],
    }  # fmt: skip
    assert set(said) == set(RUN_FIELDS)
    for_ours = for_run(say(said | CHANGES | DROPPED))
    assert for_ours.to_dict() == GenerationConfig(**said, use_cache=True).to_dict()
    assert type(for_ours.repetition_penalty) is float
    nothing = say({"eos_token_id": [], "bad_words_ids": [], "stop_strings": []})
    assert for_run(nothing).to_dict() == GenerationConfig(use_cache=True).to_dict()


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "7", "[" * 99_999, '{"a":' * 99_999, '{"eos_token_id": [' + "2," * MAX_BYTES],
)
def test_damaged_or_huge(say, text):
    """One line with the file for what is no JSON object, or larger than any."""
    with pytest.raises(ConfigError, match=r"generation_config\.json: "):
        say(text)


def test_no_file(tmp_path):
    """Then config.json says where a text ends, and is held to the same."""
    assert read_generation_config(tmp_path, {"eos_token_id": 2, "top_k": "experts"}) is None
    with pytest.raises(ConfigError, match=r"config.json: `stop_strings` must be"):
        read_generation_config(tmp_path, {"stop_strings": 5})


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)
NAMES = st.sampled_from([name for _, _, names in _FIELDS for name in names.split()])


def test_anything_is_read_or_refused(tmp_path):
    """Whatever the fields hold: a configuration that a run takes, or a ConfigError."""

    @settings(max_examples=100, deadline=None)
    @given(st.dictionaries(NAMES | st.sampled_from([*DROPPED]) | st.text(max_size=5), VALUES))
    def check(fields):
        (tmp_path / "generation_config.json").write_text(json.dumps(fields))
        try:
            config = read_generation_config(tmp_path, {})
        except ConfigError:
            return
        for_run(config).validate()

    check()


@pytest.fixture
def run(speaking, capsys):
    """Token ids of `ollm run` with such a file, and the text."""

    def run(fields, *arguments):
        (speaking / "generation_config.json").write_text(json.dumps(fields))
        arguments = ["run", str(speaking), "--prompt", "Hello", "--device", "cpu", *arguments]
        with pytest.raises(SystemExit) as ended:
            main([*arguments, "--max-new-tokens", "8", "--json"])
        captured = capsys.readouterr()
        if ended.value.code:
            return ended.value.code, captured.err
        report = json.loads(captured.out)
        return report["token_ids"], report["text"]

    return run


def test_a_run_is_what_its_options_say(run):
    """No field that decides how to decode changes an `ollm run`, greedy or sampled."""
    assert run(CHANGES | DROPPED) == run({})
    sampled = ["--temperature", "2", "--top-k", "50", "--seed", "1"]
    assert run(CHANGES | DROPPED, *sampled) == run({}, *sampled)
    code, error = run({"eos_token_id": "x"})
    assert code == 2
    assert "generation_config.json: `eos_token_id` must be" in error


def test_a_run_ends_where_the_checkpoint_says(run):
    """At any of several ends, at a stop string, with drafts too; and tokens may be forbidden."""
    tokens, text = run({})
    end = next(i for i in range(2, 8) if tokens[i] not in tokens[:i])
    assert run({"eos_token_id": [1, tokens[end], tokens[end]]})[0] == tokens[: end + 1]
    word = text.split()[1]
    stopped, short = run({"stop_strings": [word, "never said"]})
    assert stopped == tokens[: len(stopped)]
    assert len(stopped) < len(tokens)
    assert word in short
    assert run({"stop_strings": word}, "--draft", "lookup") == (stopped, short)
    assert tokens[0] not in run({"suppress_tokens": [tokens[0]]})[0]


def test_in_python_the_file_speaks_as_in_transformers(speaking):
    """`generate` returns what the file asks for, finds stop strings by the model's own tokenizer,
    and is not stopped by fields that are the engine's.
    """
    said = {"return_dict_in_generate": True, "output_logits": True, "stop_strings": ["zzzz"]}
    (speaking / "generation_config.json").write_text(json.dumps(said | DROPPED | {"top_k": 7}))
    with ollm.load(speaking, device="cpu") as model:
        ids = model.tokenizer("Hello", return_tensors="pt").input_ids
        output = model.generate(ids, max_new_tokens=3, do_sample=False)
        assert output.sequences.shape == (1, ids.shape[1] + 3)
        assert len(output.logits) == 3
        assert model.generation_config.top_k == 7
        plain = model.generate(
            ids, max_new_tokens=3, do_sample=False, return_dict_in_generate=False
        )
        assert plain.equal(output.sequences)
