"""A model that drafts for another: the same text, in the same memory, in fewer passes."""

from __future__ import annotations

import os
import threading

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    LogitsProcessor,
    Qwen3NextConfig,
)

import ollm
from ollm_adapter_qwen3_next import Qwen3NextAdapter
from ollm_core import DoesNotFitError, InputError
from ollm_core.memory.kinds import MemoryKind
from ollm_core.memory.tracker import AllocationTracker

GREEDY = {"do_sample": False, "eos_token_id": None}
SIZES = {
    "vocab_size": 199,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def gpt_oss():
    """Sliding windows, sinks and experts."""
    return GptOssConfig(**SIZES, sliding_window=64, num_local_experts=4, num_experts_per_tok=2)


def qwen3_next():
    """Recurrent states and experts."""
    return Qwen3NextConfig(**Qwen3NextAdapter().tiny_config() | {"vocab_size": 199})


@pytest.fixture
def make(make_llama, tmp_path):
    """Writes a tiny random model of a family and returns its directory."""

    def make_one(family, seed=0):
        directory = tmp_path / f"{family}-{seed}"
        if family == "llama":
            return make_llama(name=directory.name, seed=seed)
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config({"gpt": gpt_oss, "qwen": qwen3_next}[family]())
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(directory)
        return directory

    return make_one


def load(directory, draft=None, num_draft_tokens=10, **options):
    """A model on the CPU, with a draft model if one is given."""
    if draft is not None:
        options |= {"draft": "model", "draft_model": draft, "num_draft_tokens": num_draft_tokens}
    return ollm.load(directory, device="cpu", **options)


def text_of(directory, prompt, num_new, **options):
    """Greedy tokens [T], the prompt's included, and the stats."""
    with load(directory, **options) as model:
        return model.generate(prompt[None], max_new_tokens=num_new, **GREEDY)[0], model.stats


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


@pytest.mark.parametrize("family", ["gpt", "qwen"])
def test_what_it_takes_is_set_aside(make, ids, family):
    """Before the first pass, to the byte of its accounts: all weights stay in memory, no pass goes
    past its part, and torch allocates no more than that; a batch needs none of it for KV.
    """
    main, draft, prompt = make("llama", 3), make(family), ids(300)
    with load(main, draft, device_memory="30MB", host_memory="30MB") as model:
        drafter = model._drafter
        opened = model.accounts.device.kinds[MemoryKind.DRAFT_MODEL]
        model.generate(prompt[None], max_new_tokens=8, **GREEDY)
        own = drafter.part.accounts
        assert model.accounts.device.kinds[MemoryKind.DRAFT_MODEL] == own.device.limit > opened
        held = sum(own.device.kinds.get(kind, 0) for kind in ("weights", "resident weights"))
        with AllocationTracker("cpu") as tracker:
            drafter._forget()
            drafter(prompt, 10)
        assert 0 < tracker.peak <= own.device.limit - held
        for account in (own.device, own.host, model.accounts.device, model.accounts.host):
            assert account.peak <= account.limit
        file_bytes = (draft / "model.safetensors").stat().st_size
        assert drafter.engine._weights.resident_bytes > 0.8 * (file_bytes - 2 * 199 * 64 * 4)
        model.generate(prompt[:40].view(2, 20), max_new_tokens=3, **GREEDY)
        assert model.accounts.device.kinds[MemoryKind.DRAFT_MODEL] == opened
        assert own.device.used <= opened
    for account in (own.device, own.host, model.accounts.device, model.accounts.host):
        assert account.used == 0


def test_no_more_is_set_aside_than_is_used(make, ids):
    """A text that is read in the largest pieces, the last one at its end, takes all but a
    fiftieth of what is set aside for it.
    """
    with load(make("llama"), make("llama")) as model:
        drafter, text = model._drafter, ids(520)
        drafter.begin(520)
        drafter.catch_up(text[:265])
        drafter.catch_up(text)
        drafter(text[:-2], 2)
        own = drafter.part.accounts.device
        assert 0.98 * own.limit <= own.peak <= own.limit


def test_what_does_not_fit_is_refused_before_the_run(make, ids):
    """With one line that names what would do, and that does."""
    main, draft, prompt = make("llama"), make("llama", 1), ids(30)
    plain, _ = text_of(main, prompt, 12)
    refused = refusal_of(main, prompt, draft, 600_000)
    assert "for draft model beside the model" in str(refused)
    assert "allow at least" in str(refused)
    for _ in range(6):  # each names what is missing at that moment
        budget, refused = (
            refused.needed_bytes,
            refusal_of(main, prompt, draft, refused.needed_bytes),
        )
        if refused is None:
            break
        assert refused.needed_bytes > budget
    text, stats = text_of(main, prompt, 12, draft=draft, device_memory=budget, kv="host")
    assert text.equal(plain)
    assert stats.device_peak_bytes <= budget


def refusal_of(main, prompt, draft, budget):
    """What is said of too little device memory, or None."""
    try:
        text_of(main, prompt, 12, draft=draft, device_memory=budget, kv="host")
    except DoesNotFitError as refused:
        return refused
    return None


def test_kept_weights_give_way_to_longer_drafts(make, make_llama, ids):
    """The draft model's KV of a longer text takes the place of weights, comes back after it, and
    what leaves none to stream through is refused; shorter texts go on as before.
    """
    main, prompt = make_llama(name="main", num_hidden_layers=12), ids(30)
    with load(main, make("llama"), device_memory="4MB", kv="host") as model:

        def kept(num_tokens):
            model.generate(ids(num_tokens)[None], max_new_tokens=2, **GREEDY)
            assert model.stats.device_peak_bytes <= 4_000_000
            return model.weights.num_device_layers

        text = model.generate(prompt[None], max_new_tokens=12, **GREEDY)
        numbers = [kept(n) for n in (30, 1500, 30)]
        assert numbers[0] == numbers[2] > numbers[1] > 0
        with pytest.raises(DoesNotFitError, match="device memory: need"):
            kept(4000)
        assert model.generate(prompt[None], max_new_tokens=12, **GREEDY).equal(text)
        assert kept(30) == numbers[0]


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
