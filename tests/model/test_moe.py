"""Mixtures of experts: every bit is that of the un-offloaded model."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import replace

import pytest
import torch
from mixtures import BOTH, Plain, Qwen3Moe, StackedQwen3Moe, open_moe
from ragged_pass import alone
from safetensors.torch import save_file
from smallest_memory import smallest_budget

from ollm_core import UnsupportedError
from ollm_core.checkpoint.safetensors import open_checkpoint
from ollm_core.device.dtypes import DTYPES

CASES = [
    # dtype, chunk size, KV tier, reading engine
    ("float32", 64, "disk", "direct"),
    ("float16", 100, "host", "mmap"),
    ("bfloat16", 333, "device", "direct"),
]


@pytest.mark.parametrize(("dtype", "chunk_size", "kv", "reader"), CASES)
@pytest.mark.parametrize("family", BOTH)
def test_logits_are_bitwise(
    make_moe, reference, ids, tmp_path, family, dtype, chunk_size, kv, reader
):
    """Every logit of 1,100 tokens is transformers', whether all experts are kept, some or none."""
    directory = make_moe(family, DTYPES[dtype])
    prompt = ids(1100)
    expected = reference(directory, DTYPES[dtype]).run(prompt, chunk_size)

    def run(num_bytes, num_passes=1):
        options = {"chunk_size": chunk_size, "kv": kv, "kv_dir": tmp_path, "reader": reader}
        with open_moe(directory, device_memory=num_bytes, keep_kv=False, **options) as model:
            for _ in range(num_passes):
                assert torch.equal(model(input_ids=prompt[None]).logits[0], expected)
            stats = model.stats
            assert stats.experts_routed == stats.experts_hit + stats.experts_read
            assert stats.device_peak_bytes <= num_bytes
            return stats

    stats = run(60_000_000, num_passes=2)
    assert stats.experts_hit == stats.experts_read > 0  # the second pass has what the first read
    least, stats = smallest_budget(run)
    assert stats.experts_hit == 0
    stored = open_checkpoint(directory).total_bytes
    stats = run(least + stored // 2, num_passes=2)
    assert 0 < stats.experts_hit < stats.experts_read


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss"])
def test_other_mixtures_are_bitwise(make_moe, reference, ids, family, dtype):
    """A shared expert that every token goes through, or experts with biases and a gate of their
    own: 12 greedy tokens and the logits behind them are transformers'.
    """
    directory = make_moe(family, DTYPES[dtype])
    prompt = ids(300)
    tokens, logits = reference(directory, DTYPES[dtype]).greedy(prompt, 12, 64)
    with open_moe(directory, chunk_size=64, device_memory="3MB") as model:
        found = model.generate(
            prompt[None],
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
            return_dict_in_generate=True,
            output_logits=True,
        )
    assert found.sequences[0, 300:].tolist() == tokens
    assert torch.equal(torch.cat(found.logits), logits.float())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_chunk_goes_through_once(make_moe, reference, ids, dtype):
    """A decode step computes norm, router and shared expert once; a prompt in chunks, which waits
    for all of its routers, twice. Both give transformers' bits.
    """
    directory = make_moe("qwen2_moe", DTYPES[dtype])
    plain, prompt = Plain(reference(directory, DTYPES[dtype])), ids(97)
    with open_moe(directory, chunk_size=32) as model:
        calls = Counter()
        for layer in model.engine._skeleton.layers:
            for name in ("post_attention_layernorm", "mlp.gate", "mlp.shared_expert"):
                layer.get_submodule(name).register_forward_hook(
                    lambda module, states, _, name=name: calls.update(
                        () if states[0].is_meta else [name]  # the plan traces them too
                    )
                )
        cache = model.new_cache("host")
        for begin, end, times in ((0, 96, 3 * 2 * 3), (96, 97, 3)):
            tokens = prompt[None, begin:end]
            found = model(input_ids=tokens, past_key_values=cache).logits
            assert torch.equal(found, plain(tokens, 32)[0])
            assert set(calls.values()) == {times}
            assert len(calls) == 3
            calls.clear()


@pytest.mark.parametrize("num_tokens", [20, 100])
def test_a_layer_that_passes_its_experts_by_is_refused(make_moe, ids, num_tokens):
    """A declared MLP that does not call the experts is named, in one chunk or several."""

    class PassesBy(Qwen3Moe):
        def layout(self, config):
            return replace(super().layout(config), mlp=lambda layer, hidden: hidden)

    with pytest.raises(UnsupportedError, match="did not call its experts"):  # noqa: SIM117
        with open_moe(make_moe("qwen3_moe"), PassesBy(), chunk_size=32) as model:
            model(input_ids=ids(num_tokens)[None])


def test_halves_that_leave_something_out_are_refused(make_moe):
    """A residual multiplier that the standard halves know nothing of, by its value."""

    class Scaled(Qwen3Moe):
        def layout(self, config):
            return replace(super().layout(config), mixer=scaled_mixer)

    def scaled_mixer(layer, hidden, **options):
        return (
            hidden
            + 0.22 * layer.self_attn(hidden_states=layer.input_layernorm(hidden), **options)[0]
        )

    told = r"aten.add.Tensor.* gives aten.mul.Tensor\(\[1, 1, 64\], 0.22\)"
    with pytest.raises(UnsupportedError, match=told):
        open_moe(make_moe("qwen3_moe"), Scaled())


def test_halves_with_another_norm_are_refused(make_moe):
    """By the name of the parameter."""

    class Swapped(Qwen3Moe):
        def layout(self, config):
            return replace(super().layout(config), mixer=swapped_mixer)

    def swapped_mixer(layer, hidden, **options):
        normed = layer.post_attention_layernorm(hidden)
        return hidden + layer.self_attn(hidden_states=normed, **options)[0]

    with pytest.raises(
        UnsupportedError, match=r"input_layernorm.* gives .*post_attention_layernorm"
    ):
        open_moe(make_moe("qwen3_moe"), Swapped())


@pytest.mark.parametrize("family", ["qwen3_moe", "stacked"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_other_dtype_than_stored(make_moe, reference, ids, family, dtype):
    """Experts stored in bf16 and computed in another dtype give transformers' bits."""
    directory = make_moe("qwen3_moe", torch.bfloat16)
    plain = reference(directory, DTYPES[dtype])
    prompt = ids(150)
    if family == "stacked":
        state = {name: value.bfloat16() for name, value in plain.model.state_dict().items()}
        save_file(state, directory / "model.safetensors")
    adapter = StackedQwen3Moe() if family == "stacked" else Qwen3Moe()
    with open_moe(directory, adapter, chunk_size=64, dtype=dtype, device_memory="1.6MB") as model:
        for _ in range(2):
            found = model(input_ids=prompt[None]).logits[0]
            assert torch.equal(found, plain.run(prompt, 64))
        assert 0 < model.stats.experts_hit <= model.stats.experts_read


def test_progress_reaches_its_end(make_moe, ids):
    """Layers with experts count two steps a chunk, and the last step is the total."""
    seen = []
    with open_moe(make_moe("qwen3_moe"), chunk_size=32, on_progress=seen.append) as model:
        model(input_ids=ids(80)[None])
    assert [p.steps_done for p in seen] == list(range(seen[-1].steps_total + 1))
    assert seen[-1].steps_total == 3 * (3 + 2) + 1


def test_an_interrupted_pass_leaves_a_usable_model(make_moe, ids):
    """Ctrl-C while experts are computed is passed on; the next pass is right."""
    directory = make_moe("mixtral")
    prompt = ids(100)[None]
    with open_moe(directory, chunk_size=32, device_memory="1.5MB") as model:
        expected = model(input_ids=prompt).logits
        mixture = model.engine._skeleton.mixtures[1]
        real = mixture.add

        def interrupt(*arguments):
            raise KeyboardInterrupt

        mixture.add = interrupt
        with pytest.raises(KeyboardInterrupt):
            model(input_ids=prompt)
        mixture.add = real
        assert torch.equal(model(input_ids=prompt).logits, expected)


def test_ragged_pass_equals_each_alone(make_moe, ids):
    """A prompt, a decode step and a draft in one pass give the logits of three passes."""
    directory = make_moe("qwen3_moe")
    with open_moe(directory, chunk_size=32, device_memory="2MB") as model:
        cache = model.new_cache("host")
        store = cache.store
        expected, work = alone(model, store, ids)
        found = model.engine.run(store, work)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("options", [{}, {"draft": "lookup"}])
def test_generate_gives_the_tokens_of_transformers(make_moe, reference, ids, options):
    """Greedy tokens, plain and with drafts that are checked several at once, are transformers'."""
    directory = make_moe("mixtral")
    prompt = ids(20).repeat(3)
    tokens, _ = reference(directory, torch.float32).greedy(prompt, 16, 64)
    with open_moe(directory, device_memory="2MB", chunk_size=64, **options) as model:
        found = model.generate(prompt[None], max_new_tokens=16, do_sample=False, eos_token_id=None)
    assert found[0, 60:].tolist() == tokens


@pytest.mark.parametrize("family", [*BOTH, "gpt_oss"])
def test_inference_mode(make_moe, reference, ids, family):
    """A caller's inference mode changes nothing: a cache that began in it goes on outside."""
    directory, prompt = make_moe(family), ids(64)
    with open_moe(directory, chunk_size=32) as model:
        cache = model.new_cache("device")
        with torch.inference_mode():
            first = model(input_ids=prompt[None, :32], past_key_values=cache).logits[0]
        second = model(input_ids=prompt[None, 32:], past_key_values=cache).logits[0]
    expected = reference(directory, torch.float32).run(prompt, 32)
    assert torch.equal(torch.cat([first, second]), expected)


def test_two_models_on_two_threads(make_moe, reference, ids):
    """Two models interleaved on two threads do not meet."""
    prompt = ids(100)
    directories = [make_moe("mixtral"), make_moe("qwen3_moe")]
    expected = [reference(d, torch.float32).run(prompt, 32) for d in directories]
    right = {0: [], 1: []}

    def work(i):
        with open_moe(directories[i], device_memory="1.5MB", chunk_size=32) as model:
            for _ in range(4):
                logits = model(input_ids=prompt[None]).logits[0]
                right[i].append(torch.equal(logits, expected[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == {0: [True] * 4, 1: [True] * 4}


def test_close_frees_everything(make_moe, ids):
    """After close no thread is left and nothing is reserved; closing again does nothing."""
    model = open_moe(make_moe("mixtral"), device_memory="1.5MB", kv="host")
    model(input_ids=ids(20)[None])
    model.close()
    model.close()
    assert model.accounts.device.used == model.accounts.host.used == 0
    assert not [t for t in threading.enumerate() if t.name.startswith("ollm")]
