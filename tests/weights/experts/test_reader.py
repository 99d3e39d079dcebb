"""What is read of experts: only what was routed to, once per layer and pass, in few calls; and how
a model goes on after a read that failed.
"""

from __future__ import annotations

import os
import re
import time
from collections import Counter

import pytest
import torch
from mixtures import BOTH, Plain, Qwen3Moe, StackedQwen3Moe, open_moe
from safetensors.torch import save_file
from smallest_memory import smallest_budget
from transformers import AutoModelForCausalLM

from ollm_core import ReadError
from ollm_core.weights.experts.store import ExpertStore


class Reads:
    """Counts how often each tensor, or row of one, is asked of a model's byte source."""

    def __init__(self, model):
        self.seen = Counter()
        source = model.weights._source
        real = source.read

        def read(tensors, buffer):
            self.seen.update(tensor.name for tensor in tensors)
            return real(tensors, buffer)

        source.read = read

    def take(self, wanted="mlp.experts."):
        """Reads since the last call of tensors with `wanted` in their name."""
        found = {name: count for name, count in self.seen.items() if wanted in name}
        self.seen.clear()
        return found


def expert_of(name):
    """Layer and expert of a tensor, or of a row of one."""
    found = re.search(r"layers\.(\d+)\.mlp\.experts\.(?:(\d+)\.|\w+\[(\d+)\])", name)
    return int(found[1]), int(found[2] or found[3])


@pytest.fixture
def keep_none(monkeypatch):
    """No expert is kept, however much room there is."""

    class KeepsNone(ExpertStore):
        def place(self, device_bytes, host_bytes):
            return super().place(self.least_bytes, self.least_bytes)

    monkeypatch.setattr("ollm_core.weights.placement.ExpertStore", KeepsNone)


@pytest.mark.parametrize("stored", ["one file", "shards", "stacked"])
def test_only_routed_experts_are_read_each_once(make_moe, reference, ids, keep_none, stored):
    """A pass reads exactly the experts that the un-offloaded model's routers choose, each once per
    layer, whatever the chunks and rows, and from however many files.
    """
    directory = make_moe("qwen3_moe", shard="120KB" if stored == "shards" else "1GB")
    assert (len(list(directory.glob("*.safetensors"))) > 3) == (stored == "shards")
    plain = Plain(reference(directory, torch.float32))
    if stored == "stacked":
        save_file(plain.model.state_dict(), directory / "model.safetensors")
    adapter = StackedQwen3Moe() if stored == "stacked" else Qwen3Moe()
    prompt = ids(180).reshape(2, 90)
    with open_moe(directory, adapter, chunk_size=32) as model:
        reads, cache = Reads(model), model.new_cache("host")
        # A prompt in chunks, a row each; decode steps and a draft, the rows together; more prompt.
        for begin, end in ((0, 50), (50, 51), (51, 52), (52, 56), (56, 90)):
            before, tokens = model.stats, prompt[:, begin:end]
            found = model(input_ids=tokens, past_key_values=cache).logits
            after = model.stats
            expected, chosen = plain(tokens, 32)
            assert torch.allclose(found, expected, atol=1e-3)
            seen = reads.take("mlp.experts.")
            assert {expert_of(name) for name in seen} == chosen
            assert set(seen.values()) == {1}
            assert len(seen) == len(chosen) * (2 if stored == "stacked" else 3)
            assert after.experts_routed - before.experts_routed == len(chosen)
            assert after.experts_read - before.experts_read == len(chosen)
            assert after.experts_hit == 0
            num_bytes = after.expert_bytes_read - before.expert_bytes_read
            one, gap = 3 * 32 * 64 * 4, 64 << 10  # neighbours this near are read at once
            assert len(chosen) * one <= num_bytes <= len(chosen) * (one + gap)


@pytest.mark.parametrize("family", BOTH)
def test_kept_experts_are_not_read_again(make_moe, reference, ids, family):
    """What a pass does not find in memory it reads, and only that; what is kept was read once."""
    directory = make_moe(family, torch.bfloat16)
    plain = Plain(reference(directory, torch.bfloat16))
    with open_moe(directory, chunk_size=64, device_memory="0.8MB") as model:
        reads, cache = Reads(model), model.new_cache("host")
        total, begin = Counter(), 0
        for end in (64, *range(65, 90)):
            before = model.stats
            tokens = ids(90)[None, begin:end]
            found = model(input_ids=tokens, past_key_values=cache).logits
            expected, chosen = plain(tokens, 64)
            assert torch.equal(found, expected)
            after = model.stats
            seen = reads.take("experts.")
            assert after.experts_routed - before.experts_routed == len(chosen)
            assert after.experts_read - before.experts_read == len(seen) // 3
            total.update(seen)
            begin = end
        assert 0 < after.experts_hit < after.experts_routed
        assert min(total.values()) == 1 < max(total.values())


def test_neighbours_are_read_together(make_moe, ids):
    """Experts that lie side by side in a file are brought by one read call."""
    directory = make_moe("qwen3_moe")
    with open_moe(directory, chunk_size=64) as model:
        source, runs = model.weights._source, []
        real = source._read_run
        source._read_run = lambda run, buffer: (runs.append(run), real(run, buffer))
        model(input_ids=ids(64)[None])
        assert model.stats.experts_read > 20
        assert len(runs) < model.stats.experts_read // 2


@pytest.mark.parametrize("stored", ["a tensor each", "stacked"])
def test_calls_of_the_kernel(make_moe, monkeypatch, stored):
    """What lies together in a file is one `preadv`, in the order of the file: an expert's three
    tensors, and neighbours that are rows of one tensor. Experts are 192 KiB each, so that those
    between are not read along.
    """
    directory = make_moe("qwen3_moe", hidden_size=256, moe_intermediate_size=64, num_experts=16)
    if stored == "stacked":
        tensors = AutoModelForCausalLM.from_pretrained(directory).state_dict()
        save_file(tensors, directory / "model.safetensors")
    adapter = StackedQwen3Moe() if stored == "stacked" else Qwen3Moe()
    calls, real = [], os.preadv

    def preadv(file, buffers, offset, *rest):
        calls.append((offset, sum(map(len, buffers))))
        return real(file, buffers, offset, *rest)

    with open_moe(directory, adapter, chunk_size=64, reader="direct") as model:
        model.weights.fit(100_000_000, 0)
        monkeypatch.setattr(os, "preadv", preadv)
        for wanted, runs in (([5], 1), ([2, 3, 4], 1), ([1, 6, 9, 12], 4)):
            calls.clear()
            with model.weights.experts(0, wanted) as found:
                assert [e for e, _ in found] == wanted
            units = [model.weights.expert_units[0][e] for e in wanted]
            # The rows of a stacked tensor lie apart from those of the other one.
            assert len(calls) == runs * (2 if stored == "stacked" else 1)
            assert calls == sorted(calls)
            one = sum(unit.file_bytes for unit in units)
            assert one <= sum(length for _, length in calls) <= one + len(calls) * 2 * 4096
            for unit in units:
                for tensor in unit.tensors:
                    end = tensor.offset + tensor.num_bytes
                    assert any(at <= tensor.offset and end <= at + n for at, n in calls)


@pytest.mark.parametrize("kv", ["host", "disk"])
def test_a_failed_expert_read_leaves_a_usable_model(
    make_moe, reference, ids, tmp_path, keep_none, kv
):
    """A read of experts that fails in the middle of a pass is reported; the cache and the model go
    on, and what they give then is right.
    """
    directory = make_moe("qwen3_moe", torch.bfloat16)
    prompt = ids(200)
    plain = Plain(reference(directory, torch.bfloat16))
    with open_moe(directory, chunk_size=64, kv=kv, kv_dir=tmp_path) as model:
        cache = model.new_cache()
        model(input_ids=prompt[None, :128], past_key_values=cache)
        plain(prompt[None, :128], 64)
        source = model.weights._source
        real, countdown = source.read, [2]

        def failing(tensors, buffer):
            countdown[0] -= any("experts" in tensor.name for tensor in tensors)
            if countdown[0] == 0:
                raise ReadError("the disk is gone")
            return real(tensors, buffer)

        source.read = failing
        with pytest.raises(ReadError, match="the disk is gone"):
            model(input_ids=prompt[None, 128:], past_key_values=cache)
        assert cache.get_seq_length() == 128
        assert cache.store.num_tokens(cache.rows[0], 0) == 128
        found = model(input_ids=prompt[None, 128:], past_key_values=cache).logits
        assert countdown[0] < 0
        assert torch.equal(found, plain(prompt[None, 128:], 64)[0])


def test_a_gone_disk_is_forgotten_when_it_is_back(make_moe, ids):
    """Reads of experts and of the layers ahead fail together; the pass after it works."""
    directory = make_moe("mixtral", torch.bfloat16)
    prompt = ids(200)[None]

    def run(num_bytes):
        with open_moe(directory, chunk_size=64, device_memory=num_bytes, kv="host") as model:
            expected = model(input_ids=prompt).logits
            source = model.weights._source
            real, gone = source.read, [False]

            def failing(tensors, buffer):
                gone[0] |= any("experts" in tensor.name for tensor in tensors)
                if gone[0]:
                    raise ReadError("the disk is gone")
                return real(tensors, buffer)

            source.read = failing
            with pytest.raises(ReadError, match="the disk is gone"):
                model(input_ids=prompt)
            time.sleep(0.1)  # the ring reads ahead, and fails too
            source.read = real
            assert torch.equal(model(input_ids=prompt).logits, expected)

    smallest_budget(run)
