"""A model that drafts for another: the same text, in the same memory, in fewer passes."""

from __future__ import annotations

import os
import tempfile
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from draft_models import GREEDY, load, text_of
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
)

import ollm
from ollm_conformance import DrafterConformance
from ollm_core import InputError
from ollm_core.device.memory import SHARED
from ollm_core.loader import Runtime, build_drafter, inspect_directory
from ollm_core.memory.accounts import Accounts
from ollm_core.plugins.registry import Registry


@pytest.mark.parametrize(
    ("target", "draft"),
    [("llama", "llama"), ("gpt", "gpt"), ("qwen", "qwen"), ("gpt", "llama")],
)
def test_the_text_is_the_same(make, ids, target, draft):
    """The same weights draft what is right, ten of eleven tokens of each pass; others are seldom
    right. The text is that without drafts, over several blocks of KV and more than one window.
    """
    prompt = ids(245)
    main = make(target)
    plain, alone = text_of(main, prompt, 23)
    assert (alone.drafted_tokens, alone.weight_passes) == (0, 23)
    if target == draft:
        text, stats = text_of(main, prompt, 23, draft=main)
        assert text.equal(plain)
        assert (stats.weight_passes, stats.accepted_tokens) == (3, 20)
    text, stats = text_of(main, prompt, 23, draft=make(draft, seed=7), num_draft_tokens=2)
    assert text.equal(plain)
    assert stats.drafted_tokens > 20
    assert stats.accepted_tokens < 5
    assert stats.decode_tokens == alone.decode_tokens


@pytest.mark.parametrize("family", ["llama", "gpt", "qwen"])
def test_it_reads_only_what_is_new(make, ids, family):
    """Between drafts it goes back to what the text still has: it reads the prompt once, and a draft
    is the one of a model that begins anew, after right drafts, wrong ones, and another text.
    """
    directory, text = make(family), ids(300)
    with load(directory) as plain, load(directory, directory) as model:
        drafter = model._drafter
        drafter.begin(400)

        def expected(token_ids, number):
            found = plain.generate(token_ids[None], max_new_tokens=number, **GREEDY)
            return found[0, len(token_ids) :]

        def read():
            return drafter.engine.counters.counted.prefill_tokens

        drafter.catch_up(text)
        assert read() == 299
        first = drafter(text, 6)
        assert first.equal(expected(text, 6))
        for token_ids in (
            torch.cat([text, first[:6]]),  # all right
            torch.cat([text, first[:3], text[:1]]),  # the fourth wrong
            torch.cat([text, first[:3]]),  # shorter than what it has
        ):
            before = read()
            assert drafter(token_ids, 4).equal(expected(token_ids, 4))
            assert read() - before <= 8 or family == "qwen"  # whose states go back one pass only
        other = torch.cat([text[:150], ids(90, seed=5)])
        assert drafter(other, 3).equal(expected(other, 3))
        again = torch.cat([other, ids(2, seed=6)])
        before = read()
        assert drafter(again, 3).equal(expected(again, 3))
        assert read() - before <= 3


def test_the_ends_of_positions_and_of_texts(make, make_llama, ids):
    """Drafts end where the draft model's positions do, or the text."""
    short = make_llama(name="short", max_position_embeddings=64)
    prompt = ids(50)
    main = make("llama")
    plain, _ = text_of(main, prompt, 30)
    text, stats = text_of(main, prompt, 30, draft=short)
    assert text.equal(plain)
    assert 0 < stats.accepted_tokens < 20
    text, stats = text_of(main, prompt, 1, draft=main)
    assert text.equal(plain[:51])
    assert stats.drafted_tokens == 0


class Gumbel(LogitsProcessor):
    """Leaves one token: the likeliest after noise that belongs to the place in the text. So a token
    is drawn with its probability, and which one depends on nothing but the text before it.
    """

    def __init__(self, seed):
        self.seed = seed

    def __call__(self, input_ids, scores):
        noise = torch.Generator().manual_seed(1000 * self.seed + input_ids.shape[1])
        drawn = -torch.rand(scores.shape, generator=noise).log()
        chosen = (2 * scores - drawn.log()).argmax(dim=-1, keepdim=True)
        return torch.full_like(scores, -torch.inf).scatter(-1, chosen, 0.0)


def test_sampling_draws_from_the_model_alone(make, ids):
    """With noise that is tied to places, a sampled text is the same with a draft model as without,
    for each of many draws: each token is drawn from the model's own distribution after the text so
    far, whatever was drafted. Transformers draws a token at each place of the draft and takes them
    up to the first that differs, that one included.
    """
    main, prompt = make("llama"), ids(20)
    options = {"do_sample": True, "max_new_tokens": 12, "eos_token_id": None}
    noises = [Gumbel(seed) for seed in range(3)]
    with load(main) as plain:
        texts = [
            plain.generate(prompt[None], logits_processor=[noise], **options) for noise in noises
        ]
    assert len({tuple(text[0].tolist()) for text in texts}) == 3
    for draft, lucky in ((main, True), (make("llama", 1), False)):
        with load(main, draft, 4) as model:
            for noise, text in zip(noises, texts, strict=True):
                found = model.generate(prompt[None], logits_processor=[noise], **options)
                assert found.equal(text)
            assert model.stats.drafted_tokens > 30
            assert (model.stats.accepted_tokens > 8) == lucky


def test_the_time_of_drafting_counts(make, ids):
    """What is told of decoding holds the passes of the draft model too."""
    main = make("llama")
    with load(main, main) as model:
        model.generate(ids(300)[None], max_new_tokens=12, **GREEDY)
        inside = model._drafter.engine.counters.counted
        assert model.stats.decode_tokens == 11
        assert model.stats.decode_seconds > inside.decode_seconds > 0


def test_a_seed_repeats_a_sampled_text(make, ids):
    """The draft model draws nothing, so a seed gives the same text again."""
    main, prompt = make("llama"), ids(20)
    options = {"do_sample": True, "temperature": 0.3, "max_new_tokens": 20, "eos_token_id": None}
    texts = []
    for _ in range(2):
        with load(main, main, None) as model:
            torch.manual_seed(5)
            texts.append(model.generate(prompt[None], **options))
            assert model.stats.drafted_tokens > 0
    assert texts[0].equal(texts[1])


def test_two_models_on_two_threads(make, ids):
    """Each has a draft model of its own; neither sees the other."""
    cases = [(make("llama"), make("llama", 1), ids(60)), (make("gpt"), make("gpt"), ids(50))]
    expected = [text_of(main, prompt, 12)[0] for main, _, prompt in cases]
    found = [None, None]

    def run(place):
        main, draft, prompt = cases[place]
        found[place] = text_of(main, prompt, 12, draft=draft)[0]

    threads = [threading.Thread(target=run, args=(place,)) for place in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0].equal(expected[0])
    assert found[1].equal(expected[1])


def test_a_chat_goes_on(make, ids):
    """In a second turn on the same cache it reads what is new, and the text is the same."""
    main, prompt, more = make("llama"), ids(300), ids(20, seed=8)
    with load(main) as plain:
        first = plain.generate(prompt[None], max_new_tokens=20, **GREEDY)
        second = torch.cat([first, more[None]], dim=1)
        expected = plain.generate(second, max_new_tokens=20, **GREEDY)
    with load(main, main) as model:
        cache = model.new_cache()
        turn = {"past_key_values": cache, "max_new_tokens": 20, **GREEDY}
        assert model.generate(prompt[None], **turn).equal(first)
        before = model._drafter.engine.counters.counted.prefill_tokens
        assert model.generate(second, **turn).equal(expected)
        assert model._drafter.engine.counters.counted.prefill_tokens - before < 60


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"draft": "model"}, "need a draft model, have none"),
        ({"draft_model": "x"}, "need draft 'model', have 'none'"),
        ({"draft": "lookup", "draft_model": "x"}, "need draft 'model', have 'lookup'"),
        ({"draft": "model", "draft_model": "./not/there"}, "there is no directory"),
    ],
)
def test_what_names_no_draft_model_is_refused(make, options, words):
    """In one line with a hint, before anything is read."""
    with pytest.raises(InputError, match=words) as refused:
        ollm.load(make("llama"), device="cpu", **options)
    assert refused.value.hint
    assert "\n" not in str(refused.value)


def test_another_vocabulary_is_refused(make, make_llama, tmp_path):
    """Another size, or the same size and other tokens; nothing is left open."""
    main = make("llama")
    with pytest.raises(InputError, match=r"vocabulary of 200 tokens, the model one of 199") as size:
        load(main, make_llama(name="larger", vocab_size=200))
    assert "same family" in size.value.hint
    other = make("llama", 1)
    for directory, words in ((main, "abc"), (other, "abd")):
        save_tokenizer(directory, words)
    num_open = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        with pytest.raises(InputError, match=r"id of 'c' is none in its vocabulary, and 2 in"):
            load(main, other)
    assert len(os.listdir("/proc/self/fd")) <= num_open
    save_tokenizer(other, "abc")
    load(main, other).close()


def save_tokenizer(directory, words):
    """A tokenizer that knows single letters."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(directory)


def test_a_larger_draft_model_is_told_of(make, make_llama, caplog):
    """In one line; it is allowed."""
    large = make_llama(name="large", num_hidden_layers=6)
    with load(make("llama"), large):
        assert [record.message.split(":")[0] for record in caplog.records] == [
            "the draft model is larger than the model"
        ]
    caplog.clear()
    with load(large, make("llama")):
        assert not caplog.records


class TestModelDrafter(DrafterConformance):
    """A small model in memory."""

    directory: Path

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def checkpoint(cls):
        """A random Llama with peaked logits."""
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=cls.vocab_size, hidden_size=64, intermediate_size=112, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.2)
        with tempfile.TemporaryDirectory() as name:
            cls.directory = Path(name)
            model.save_pretrained(name)
            yield

    @classmethod
    def open_drafter(cls, request):
        whole = Accounts(request.device_account, request.host_account)

        def set_aside(kind, more):
            whole.device.reserve(kind, more.device)
            with ExitStack() as stack:
                stack.callback(whole.device.release, kind, more.device)
                whole.host.reserve(kind, more.host)
                stack.pop_all()

        runtime = Runtime(Registry.discover(), torch.device("cpu"), "auto", "fast", "auto", SHARED)
        spec = inspect_directory(runtime, cls.directory)
        return build_drafter(runtime, spec, whole, set_aside)
