"""What a run computes by default, `precision="fast"`: attention block by block over handles where
the layers hand them on, products summed in float32, drafts; and what is refused that.
"""

from contextlib import nullcontext

import pytest
import torch
from trial import CHUNK, run_ours, run_reference, run_reference_greedy, saved, steps

import ollm
from ollm_core import DoesNotFitError, UnsupportedError
from ollm_core.testing import NewTokens, without_instructions

DIFFER = {
    "cohere2": "windows in some layers, parallel blocks, a scale on logits",
    "falcon_h1": "states beside keys in the same layers",
    "gemma2": "soft caps, and windows in every second layer",
    "gemma3_text": "windows, and two rotary embeddings",
    "glm4": "a rotary embedding of a part of each head",
    "gpt2": "learned positions, weights the other way round",
    "gpt_neox": "one product for queries, keys and values",
    "gpt_oss": "sinks and windows",
    "granite": "a scale of its own",
    "granitemoehybrid": "states in some layers, experts in all",
    "jamba": "state-space layers, attention and experts in turns",
    "lfm2": "convolutions in some layers",
    "mimo_v2_flash": "keys and values of different sizes, sinks",
    "mixtral": "experts",
    "olmo2": "norms of queries and keys",
    "opt": "positions of all tokens that came before",
    "phi3": "products that are fused",
    "qwen3": "norms of each head",
    "starcoder2": "windows in all layers, biases",
}
BARE = ("falcon_h1", "gemma2", "jamba", "mixtral", "mimo_v2_flash")
"""Of these, such as are run without a processor's instructions, too."""
LAID_OUT = {
    "bloom": "its layers do not hand on what a cache gives them",
    "deepseek_v3": "its layers do not hand on what a cache gives them",
    "deepseek_v32": "an index chooses the keys that its layers attend to",
    "gemma3n_text": "its layers share keys and values",
    "llama4_text": "shows something else than a window of 24",
}


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    """Without the adapters of families."""
    monkeypatch.setenv("OLLM_LOAD_PLUGINS", "ollm-adapter-transformers")


def prompts(num_rows, num_tokens):
    """Random ids."""
    return torch.randint(3, 250, (num_rows, num_tokens), generator=torch.Generator().manual_seed(0))


def greedy(model, ids, num_new, **options):
    """The new tokens."""
    found = model.generate(
        ids, max_new_tokens=num_new, do_sample=False, eos_token_id=None, pad_token_id=0, **options
    )
    return found[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("model_type", DIFFER)
def test_same_tokens_in_float32(model_type):
    """Logits of a prompt of several blocks and of steps, for two rows, and in chunks with KV on
    disk; greedy text.
    """
    with saved(model_type, torch.float32) as (model, directory):
        ids = prompts(2, 330)
        expected = run_reference(model, ids, steps(330))
        most = 1e-5 * float(expected.abs().max())
        with ollm.load(directory, device="cpu") as ours:
            assert (run_ours(ours, ids, steps(330)) - expected).abs().max() <= most
            assert ours.stats.attention == "blockwise"
            assert greedy(ours, ids[:1, :20], 6) == run_reference_greedy(model, ids[:1, :20])
        options = {"chunk_size": CHUNK, "kv": "disk", "kv_dir": directory / "kv"}
        if model_type == "jamba":
            return  # which takes no chunks
        cuts = [*range(CHUNK, 326, CHUNK), *steps(330)]
        expected = run_reference(model, ids[:1], cuts)[:, -5:]
        with ollm.load(directory, device="cpu", **options) as ours:
            assert (run_ours(ours, ids[:1], steps(330)) - expected).abs().max() <= most


@pytest.mark.parametrize(
    ("model_type", "bare"),
    [(one, bare) for one in DIFFER for bare in (False, True) if not bare or one in BARE],
)
def test_no_more_rounding_than_transformers(model_type, bare):
    """In bfloat16, whatever the processor's instructions are: the error against float64 of the
    token in the middle, as the suite has it.
    """
    with saved(model_type, torch.bfloat16) as (model, directory):
        ids = prompts(1, 300)
        with torch.no_grad():
            own = model(ids).logits
            true = model.double()(ids).logits
        with (
            without_instructions() if bare else nullcontext(),
            ollm.load(directory, device="cpu") as ours,
        ):
            found = ours(ids).logits
    of_ours, of_theirs = (
        float((logits.double() - true).square().mean(-1).sqrt().quantile(0.5))
        for logits in (found, own)
    )
    assert of_ours <= 1.1 * of_theirs + 2.0**-20 * float(true.abs().max())


@pytest.mark.parametrize("model_type", LAID_OUT)
def test_past_laid_out(model_type):
    """Block-wise attention is refused by its reason; by default a run is exact."""
    with saved(model_type, torch.float32) as (model, directory):
        with pytest.raises(UnsupportedError, match=LAID_OUT[model_type]):
            ollm.load(directory, device="cpu", attention="blockwise")
        ids = prompts(1, 300)
        with ollm.load(directory, device="cpu", kv="disk", kv_dir=directory / "kv") as ours:
            found = run_ours(ours, ids, steps(300))
            assert ours.stats.attention == "exact"
        assert torch.equal(found, run_reference(model, ids, steps(300)))


@pytest.mark.parametrize("model_type", ["falcon_h1", "gemma2", "jamba", "mamba2", "mimo_v2_flash"])
@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_drafts(model_type, precision):
    """After any number of accepted tokens a sequence goes on as one that was never drafted for;
    with states every bit of it, as drafted tokens go one by one.
    """
    with saved(model_type, torch.float32) as (_, directory):
        ids = prompts(1, 60)[0]
        with ollm.load(directory, device="cpu", precision=precision) as ours:
            cache = ours.new_cache("device")
            store, run = cache.store, ours.engine.run
            sequence = store.new_sequence()
            run(store, [NewTokens(sequence, ids[:40], 0)])
            steps_alone = [
                run(store, [NewTokens(sequence, ids[i : i + 1], i)])[0][0] for i in range(40, 50)
            ]
            expected = torch.stack(steps_alone)
            for accepted in (0, 2, 5):
                sequence = store.new_sequence()
                run(store, [NewTokens(sequence, ids[:40], 0)])
                drafted = ids[40:46].clone()
                drafted[accepted + 1 :] = 7
                (found,) = run(store, [NewTokens(sequence, drafted, 40, 6, num_drafted=5)])
                store.truncate(sequence, 41 + accepted)
                rest = ids[41 + accepted : 50]
                (more,) = run(store, [NewTokens(sequence, rest, 41 + accepted, len(rest))])
                found = found[: accepted + 1]
                assert (torch.cat([found, more]) - expected).abs().max() < 1e-5
                if model_type in ("falcon_h1", "jamba", "mamba2"):
                    assert torch.equal(found, expected[: accepted + 1])


@pytest.mark.parametrize("model_type", ["jamba", "mamba"])
def test_layers_that_begin_anew(model_type):
    """Their states would be lost in a call of several tokens that goes on: there is none, neither
    in a long prompt nor in a second turn.
    """
    with saved(model_type, torch.float32, max_position_embeddings=1024) as (model, directory):
        with torch.no_grad():
            for parameter in model.parameters():  # states that show in what follows
                parameter *= 3 if parameter.dim() > 1 else 1
        model.save_pretrained(directory)
        ids = prompts(1, 600)
        expected = run_reference(model, ids, [580, *range(581, 601)])
        with pytest.raises(UnsupportedError, match="begin anew"):
            ollm.load(directory, device="cpu", chunk_size=CHUNK)
        with ollm.load(directory, device="cpu") as ours:
            found = run_ours(ours, ids, [580, 600])
        _goes_token_by_token(model, directory, ids)
        most = 5e-5 * float(expected.abs().max())
        assert (found - expected[:, [0, -1]]).abs().max() <= most
        wrong = run_reference(model, ids, [580, 600])
        assert (wrong - expected[:, [0, -1]]).abs().max() > 2 * most


def _goes_token_by_token(model, directory, ids):
    """In memory in which a whole prompt does not fit, as its refusal says, bit for bit."""
    options = {"device": "cpu", "precision": "exact", "attention": "exact"}
    with pytest.raises(DoesNotFitError) as refused:
        ollm.load(directory, **options, device_memory=1)
    ids, little = ids[:, :60], refused.value.needed_bytes
    with (
        ollm.load(directory, **options, device_memory=little) as ours,
        pytest.raises(DoesNotFitError, match="chunk_size=1, one token after the other") as refused,
    ):
        run_ours(ours, ids, [60])
    whole = refused.value.needed_bytes
    with ollm.load(directory, **options, device_memory=whole - 1, chunk_size=1) as ours:
        found = run_ours(ours, ids, [60])
    assert torch.equal(found, run_reference(model, ids, [*range(1, 61)])[:, -1:])


@pytest.mark.parametrize("model_type", ["jamba", "lfm2", "phi3"])
def test_lookup(model_type):
    """Prompt lookup gives the same text in fewer passes."""
    with saved(model_type, torch.float32) as (_, directory):
        ids = prompts(1, 12).repeat(1, 3)
        with ollm.load(directory, device="cpu", draft="none") as ours:
            expected = greedy(ours, ids, 40)
        with ollm.load(directory, device="cpu", draft="lookup", num_draft_tokens=4) as ours:
            assert greedy(ours, ids, 40) == expected
            assert ours.stats.drafted_tokens > 0
            changed = greedy(ours, ids, 20, repetition_penalty=1.3)  # which writes into logits
        with ollm.load(directory, device="cpu", draft="none") as ours:
            assert greedy(ours, ids, 20, repetition_penalty=1.3) == changed
