"""Checks of models beside each other, and of what goes wrong."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path

import pytest
import torch

from ollm_conformance.adapter.base import AdapterSuite
from ollm_conformance.broken_off import interrupt_at
from ollm_conformance.checks import check
from ollm_conformance.compare import refused, same_bits, same_tokens
from ollm_conformance.held import same_lengths
from ollm_conformance.subject import Reference, Subject, greedy
from ollm_conformance.untouched import untouched
from ollm_core import ReadError
from ollm_core.testing import (
    NotFiniteError,
    SequenceCache,
    StreamedModel,
    failing_reads,
    logical_tensors,
    open_checkpoint,
    read_config,
)

_LOOK = "module-level state in the adapter"


class Isolation(AdapterSuite):
    """Two models in one process do not see each other."""

    @check(
        "isolation.interleaved",
        "Two models of other weights and sizes, used in turn, give what each gives alone.",
        look=_LOOK,
    )
    def test_interleaved(self, subject: Subject) -> None:
        prompt = subject.prompt(200).clamp(max=subject.vocab_size - 2)
        directories = [subject.tiny(), _other(subject)]
        expected = [subject.reference(directory=d).greedy(prompt, 8)[0] for d in directories]
        models = [subject.open(d) for d in directories]
        caches = [model.new_cache() for model in models]
        found: list[list[int]] = [[], []]
        ids = [prompt, prompt]
        for _ in range(8):
            for i, model in enumerate(models):
                logits = model(
                    input_ids=ids[i][None], past_key_values=caches[i], logits_to_keep=1
                ).logits
                found[i].append(int(logits[0, -1].argmax()))
                ids[i] = torch.tensor(found[i][-1:])
        for model in models:
            model.close()
        for i in range(2):
            same_tokens(found[i], expected[i], f"tokens of model {i + 1}")

    @check(
        "isolation.threads",
        "Two models on two threads, and plain transformers beside them, do not disturb each other.",
        look=_LOOK,
    )
    def test_threads(self, subject: Subject) -> None:
        prompt = subject.prompt(150).clamp(max=subject.vocab_size - 2)
        directories = [subject.tiny(), _other(subject)]
        references = [subject.reference(directory=directory) for directory in directories]
        expected = [reference.greedy(prompt, 8)[0] for reference in references]
        texts = [prompt.roll(shift) for shift in range(4)]
        alone = [references[0].run(text, 200) for text in texts]
        found: dict[int, list[list[int]]] = {0: [], 1: []}

        def work(i: int) -> None:
            with subject.open(directories[i]) as model:
                for _ in range(3):
                    found[i].append(greedy(model, prompt, 8)[0])

        threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        fresh = Reference(directories[0], torch.float32)  # which has no answers yet
        beside = [fresh.run(text, 200) for text in texts]
        for thread in threads:
            thread.join()
        for i in range(2):
            assert len(found[i]) == 3, (
                f"thread {i + 1}: expected 3 answers, got {len(found[i])}: it ended with an error"
            )
            for tokens in found[i]:
                same_tokens(tokens, expected[i], f"tokens of thread {i + 1}")
        for logits, wanted in zip(beside, alone, strict=True):
            same_bits(logits, wanted, "logits of transformers beside them")

    @check(
        "isolation.transformers",
        "A plain transformers model made after ours gives what one made before it gave.",
        look="attributes of transformers that the adapter replaces",
    )
    def test_transformers(self, subject: Subject) -> None:
        prompt, directory = subject.prompt(100), subject.tiny()
        expected = subject.reference().run(prompt, 100)
        modeling = type(subject.reference().model).__module__
        with untouched(modeling), subject.open(directory) as model:
            model(input_ids=prompt[None])
            during = Reference(directory, torch.float32).run(prompt, 100)
        after = Reference(directory, torch.float32).run(prompt, 100)
        same_bits(during, expected, "logits of transformers beside an open model")
        same_bits(after, expected, "logits of transformers after close")

    @check(
        "isolation.random-state",
        "Neither opening a model nor greedy decoding draws from torch's global random numbers.",
        look="transforms of source(), and code of the adapter that makes tensors",
    )
    def test_random_state(self, subject: Subject) -> None:
        subject.tiny()
        before = torch.get_rng_state()
        with subject.open() as model:
            greedy(model, subject.prompt(20), 3)
        same_bits(torch.get_rng_state(), before, "torch's random state")


class Failure(AdapterSuite):
    """What goes wrong in the middle of a pass leaves a usable model and no torn cache."""

    @check(
        "failure.read-error",
        "A read that fails is an error, the cache stays as it was, and the model goes on.",
        look="code of the adapter that catches errors",
    )
    @pytest.mark.parametrize("kv", ["device", "disk"])
    def test_read_error(self, subject: Subject, kv: str) -> None:
        prompt, directory = subject.prompt(330), subject.tiny("bfloat16")

        def work(model: StreamedModel) -> None:
            cache = model.new_cache()
            model(input_ids=prompt[None, :270], past_key_values=cache, logits_to_keep=1)
            model(input_ids=prompt[None, 270:], past_key_values=cache)

        least = subject.least_memory(work, directory, kv=kv)
        with subject.open(directory, device_memory=least, kv=kv) as model:
            cache = model.new_cache()
            model(input_ids=prompt[None, :270], past_key_values=cache, logits_to_keep=1)

            with failing_reads(model):
                with contextlib.suppress(ReadError):  # uses up what was read ahead
                    model(input_ids=prompt[None, :1])
                with refused(ReadError, f"a pass with KV on {kv} whose reads fail") as refusal:
                    model(input_ids=prompt[None, 270:], past_key_values=cache)
                refusal.says("the disk is gone")
            _goes_on(subject, model, cache, prompt, f"after a read error, KV on {kv}")

    @check(
        "failure.short-read",
        "A checkpoint that became shorter while it was open is an error, never other tokens, until "
        "it is whole and opened again.",
        look="code of the adapter that catches errors",
    )
    @pytest.mark.parametrize("reader", ["direct", "mmap"])
    def test_short_read(self, subject: Subject, reader: str) -> None:
        prompt = subject.prompt(100)
        directory = subject.copy(subject.tiny("bfloat16"))

        def work(model: StreamedModel) -> None:
            model(input_ids=prompt[None], logits_to_keep=1)

        def work_thrice(model: StreamedModel) -> None:
            for _ in range(3):
                work(model)

        least = subject.least_memory(work, directory, reader=reader)
        (file,) = directory.glob("*.safetensors")
        whole = file.read_bytes()
        with subject.open(directory, device_memory=least, reader=reader) as model:
            expected = model(input_ids=prompt[None]).logits
            with file.open("r+b") as cut:
                cut.truncate(len(whole) // 3)
            with refused(ReadError, f"passes on a file cut short, read by {reader}"):
                work_thrice(model)
            with file.open("r+b") as again:
                again.write(whole)
            for number in range(3):  # what is in memory may be of either file
                what = f"pass {number + 1} on a file that was cut short, read by {reader}"
                with refused(ReadError, what):
                    work(model)
        with subject.open(directory, device_memory=least, reader=reader) as model:
            found = model(input_ids=prompt[None]).logits
        same_bits(found, expected, "logits after the file is whole again")

    @check(
        "failure.overwritten",
        "Weights that are overwritten while they are open are an error, and the cache stays as it "
        "was; opened again, the model is the new one.",
        look="code of the adapter that catches errors",
    )
    def test_overwritten(self, subject: Subject) -> None:
        prompt = subject.prompt(100)
        directory = subject.copy(subject.tiny(shards=True))
        with subject.open(directory) as model:
            cache = model.new_cache()
            model(input_ids=prompt[None, :60], past_key_values=cache, logits_to_keep=1)
            subject.overwrite(directory, last_file=True)
            for number in range(2):
                what = f"pass {number + 1} on weights that were overwritten"
                with refused(ReadError, what):
                    model(input_ids=prompt[None, 60:], past_key_values=cache)
                length = cache.get_seq_length()
                assert length == 60, f"{what}: expected the 60 tokens from before, got {length}"
        with subject.open(directory) as model:
            found = model(input_ids=prompt[None]).logits[0]
        expected = subject.reference(directory=directory).run(prompt)
        same_bits(found, expected, "logits of the new weights")

    @check(
        "failure.not-finite",
        "Logits that are no numbers are an error in one line, never a token.",
        look="source(): weights that overflow in another dtype",
    )
    def test_not_finite(self, subject: Subject) -> None:
        directory = subject.copy(subject.tiny())
        checkpoint, config = open_checkpoint(directory), read_config(directory)
        layout = subject.adapter.layout(config)
        plan = subject.adapter.weights(config, logical_tensors(directory).names)
        layers = f"{layout.layers}.{layout.num_layers - 1}."
        norm = f"{layout.norm}.weight"
        if layout.own_forward:  # which norm is the last one is not declared
            norm = max(name for name in plan.parameters if name.startswith(layers))
        stored = checkpoint.tensors[plan.parameters[norm].tensors[0]]
        with stored.path.open("r+b") as file:
            file.seek(stored.offset)
            file.write(torch.tensor([float("nan")]).numpy().tobytes())
        with subject.open(directory) as model, refused(NotFiniteError, f"{norm} with a NaN"):
            model(input_ids=subject.prompt(20)[None])

    @check(
        "failure.not-finite-row",
        "Logits that are no numbers in one row of a batch are an error too, whichever row it is.",
        look="source(): weights that overflow in another dtype",
        needs=["batch"],
    )
    def test_not_finite_row(self, subject: Subject) -> None:
        directory = subject.copy(subject.tiny())
        checkpoint, config = open_checkpoint(directory), read_config(directory)
        embedding = f"{subject.adapter.layout(config).embedding}.weight"
        plan = subject.adapter.weights(config, logical_tensors(directory).names)
        stored = checkpoint.tensors[plan.parameters[embedding].tensors[0]]
        rows = torch.stack([subject.prompt(20), subject.prompt(20)])
        used = {*rows[0].tolist(), *subject.prompt(20, seed=1).tolist()}
        damaged = next(token for token in range(3, stored.shape[0]) if token not in used)
        with stored.path.open("r+b") as file:
            file.seek(stored.offset + damaged * (stored.num_bytes // stored.shape[0]))
            file.write(torch.tensor([float("nan")]).numpy().tobytes())
        with subject.open(directory) as model:
            for row in (1, 0):
                ids = rows.clone()
                ids[row, 10] = damaged
                with refused(NotFiniteError, f"token {damaged}, which is a NaN, in row {row} of 2"):
                    model(input_ids=ids)

    @check(
        "failure.cancelled",
        "Ctrl-C at any step of a pass leaves the cache as it was, and the model goes on.",
        look="code of the adapter that catches errors",
    )
    @pytest.mark.parametrize("kv", ["device", "disk"])
    def test_cancelled(self, subject: Subject, kv: str) -> None:
        prompt = subject.prompt(330)
        with subject.open(subject.tiny("bfloat16"), kv=kv) as model:
            cache = model.new_cache()
            model(input_ids=prompt[None, :270], past_key_values=cache, logits_to_keep=1)
            for part in (0.0, 0.3, 0.6, 1.0):
                model.on_progress(interrupt_at(part))
                what = f"a pass with KV on {kv}, stopped after {part:.0%} of its steps"
                with refused(KeyboardInterrupt, what):
                    model(input_ids=prompt[None, 270:], past_key_values=cache)
                model.on_progress(None)
            _goes_on(subject, model, cache, prompt, f"after Ctrl-C, KV on {kv}")


def _goes_on(
    subject: Subject, model: StreamedModel, cache: SequenceCache, prompt: torch.Tensor, what: str
) -> None:
    """The cache has 270 tokens, and the rest of the prompt gives the bits of an untroubled run."""
    length = cache.get_seq_length()
    assert length == 270, f"{what}: expected the 270 tokens from before, got {length}"
    same_lengths(cache.store, cache.rows, [270], len(cache), what)
    found = model(input_ids=prompt[None, 270:], past_key_values=cache).logits[0]
    reference = subject.reference("bfloat16")
    mine = reference.new_cache()
    reference.run(prompt[:270], cache=mine)
    same_bits(found, reference.run(prompt[270:], cache=mine), f"logits {what}")


def _other(subject: Subject) -> Path:
    """A checkpoint of another size and with other weights."""
    return subject.tiny(changes={"vocab_size": subject.vocab_size - 1})
