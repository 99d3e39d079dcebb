"""A pass that was broken off is gone on with, bit for bit, in every kind of model."""

from __future__ import annotations

import gc
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import ollm
from ollm_adapter_gpt_oss import GptOssAdapter
from ollm_adapter_llama import LlamaAdapter
from ollm_adapter_qwen3_next import Qwen3MoeAdapter, Qwen3NextAdapter
from ollm_conformance.subject import Subject
from ollm_core import DoesNotFitError, ReadError
from ollm_core.engine.batch import Chunk, NewTokens
from ollm_core.engine.checkpoint import CheckpointPolicy, PassCheckpoint, checkpoint_of
from ollm_core.engine.pass_planner import PassPlan, PassPlanner
from ollm_core.engine.weight_pass import WeightPass
from ollm_core.errors import NotFiniteError
from ollm_core.kv.disk.inventory import take_inventory
from ollm_core.memory.pair import PerMemory

ALWAYS = CheckpointPolicy(least_tokens=300, after_seconds=0, share=1e9)
NUM_TOKENS = 601
FAMILIES = {
    "llama": LlamaAdapter,
    "gpt-oss": GptOssAdapter,
    "qwen3-moe": Qwen3MoeAdapter,
    "qwen3-next": Qwen3NextAdapter,
}
OWN = {
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 1024},
    "gemma2": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "head_dim": 8,
        "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 100,
    },
    "falcon_h1": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "head_dim": 8,
        "num_attention_heads": 4, "num_key_value_heads": 2, "mamba_d_ssm": 32,
        "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A tiny checkpoint of each family, made when it is asked for."""
    made = {}

    def make(name, dtype="float32"):
        if (name, dtype) not in made:
            directory = tmp_path_factory.mktemp(name)
            if name in FAMILIES:
                subject = Subject(FAMILIES[name](), directory)
                made[name, dtype] = subject.tiny(dtype)
            else:
                torch.manual_seed(0)
                config = AutoConfig.for_model(name, vocab_size=199, **OWN[name])
                model = AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype))
                model.save_pretrained(directory / "model")
                made[name, dtype] = directory / "model"
        return made[name, dtype]

    return make


class Run:
    """Runs over one prompt in one directory, broken off or not."""

    def __init__(self, directory, kv_dir, **options):
        self.directory, self.kv_dir = directory, kv_dir
        self.options = {"chunk_size": 128, "device_memory": "1GB"} | options
        generator = torch.Generator().manual_seed(3)
        self.prompt = torch.randint(5, 99, (1, NUM_TOKENS), generator=generator)

    def __call__(self, policy=ALWAYS, **options):
        """Logits [3, V] of the prompt's last token and two more."""
        progress = []
        options = {**self.options, **options}
        with ollm.load(
            self.directory, device="cpu", kv="disk", kv_dir=self.kv_dir, **options
        ) as model:
            model.engine.checkpoints = policy
            model.on_progress(progress.append)
            cache = model.new_cache()
            found = model(input_ids=self.prompt, logits_to_keep=1, past_key_values=cache).logits
            rows, self.last = [found[0, -1]], progress[-1]
            model.on_progress(None)
            for _ in range(2):
                ids = rows[-1].argmax().view(1, 1)
                found = model(input_ids=ids, past_key_values=cache).logits
                rows.append(found[0, -1])
            return torch.stack(rows)

    def broken_off(self, num_layers, **options):
        """When the first chunk is through the layer after so many; -> how far that is told."""
        assert num_layers
        with ollm.load(
            self.directory, device="cpu", kv="disk", kv_dir=self.kv_dir,
            **{**self.options, **options},
        ) as model:  # fmt: skip
            model.engine.checkpoints = ALWAYS

            def stop(progress):
                if progress.saved_layers == num_layers:
                    raise KeyboardInterrupt

            model.on_progress(stop)
            with pytest.raises(KeyboardInterrupt):
                model(input_ids=self.prompt, logits_to_keep=1)
        gc.collect()

    def left(self):
        """Unfinished prompts."""
        return take_inventory(self.kv_dir).unfinished if self.kv_dir.exists() else []


@pytest.mark.parametrize(
    ("name", "attention"),
    [("llama", "exact"), ("gemma2", "exact"), *((name, "auto") for name in (*FAMILIES, *OWN))],
)
def test_it_goes_on_bit_for_bit(models, tmp_path, name, attention):
    """After the first layer, and after the last but one."""
    options = {"attention": attention}
    if name == "falcon_h1":
        options |= {"chunk_size": 1024}
    whole = Run(models(name), tmp_path / "whole", **options)
    expected = whole()
    num_layers = whole.last.num_layers
    assert num_layers > 1
    assert whole.left() == []
    for num_done in {1, num_layers - 1}:
        run = Run(models(name), tmp_path / f"kv{num_done}", **options)
        run.broken_off(num_done)
        [found] = run.left()
        assert (found.one.num_done, found.one.num_layers) == (num_done, num_layers)
        logits = run()
        assert torch.equal(logits, expected)
        assert run.last.resumed_layers == num_done
        assert run.left() == []
        assert run.last.steps_done == run.last.steps_total
        kept = [path.name for path in run.kv_dir.rglob("*") if "unfinished" in path.name]
        assert kept == []


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_half_precision_and_hidden_states_on_the_host(models, tmp_path, monkeypatch, name):
    """Whatever memory has them: that changes no bit, so the next run may have them elsewhere."""
    directory = models(name, "bfloat16")
    whole = Run(directory, tmp_path / "whole", attention="blockwise")
    expected = whole()
    run = Run(directory, tmp_path / "kv", attention="blockwise")
    run.broken_off(1)
    original = PassPlanner._candidates

    def on_host(self, *asked):
        return (plan for plan in original(self, *asked) if plan.hidden_on_host)

    monkeypatch.setattr(PassPlanner, "_candidates", on_host)
    assert torch.equal(run(), expected)
    assert run.last.resumed_layers == 1
    other = Run(directory, tmp_path / "other", attention="blockwise")
    other.broken_off(2)
    monkeypatch.undo()
    assert torch.equal(other(), expected)
    assert other.last.resumed_layers == 2


def test_a_kept_beginning_and_what_comes_after_it(models, tmp_path):
    """The checkpoint is of the rest."""
    whole = Run(models("llama"), tmp_path / "whole")
    run = Run(models("llama"), tmp_path / "kv")
    for one in (whole, run):
        beginning, prompt = one.prompt[:, :280], one.prompt
        one.prompt = beginning
        one(policy=CheckpointPolicy())
        one.prompt = prompt
    expected = whole()
    run.broken_off(2)
    [found] = run.left()
    assert found.one.start == 280
    assert torch.equal(run(), expected)
    assert run.last.resumed_layers == 2


@pytest.mark.parametrize(
    "other",
    [{"chunk_size": 64}, {"attention": "blockwise"}, {"dtype": "bfloat16"}],
)
def test_other_settings_begin_anew(models, tmp_path, other):
    """What would give other bits; with another dtype it is another cache."""
    expected = Run(models("llama"), tmp_path / "whole", **{"attention": "exact"} | other)()
    run = Run(models("llama"), tmp_path / "kv", attention="exact")
    run.broken_off(1)
    assert torch.equal(run(**other), expected)
    assert run.last.resumed_layers == 0


def test_other_threads_begin_anew(models, tmp_path):
    """Sums may then be made in another order."""
    run = Run(models("llama"), tmp_path / "kv")
    run.broken_off(1)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        run()
    finally:
        torch.set_num_threads(threads)
    assert run.last.resumed_layers == 0


def test_a_pass_that_ran_out_of_memory_goes_on(models, tmp_path, monkeypatch):
    """It is tried once more, from the layer that it was in."""
    expected = Run(models("llama"), tmp_path / "whole")()
    run, original, calls = Run(models("llama"), tmp_path / "kv"), WeightPass.run, []

    def failing(self):
        calls.append(self.checkpoint.first_layer)
        if len(calls) == 1:
            report = self.progress.on_progress

            def out_of_memory(progress):
                if progress.saved_layers == 1:
                    raise torch.OutOfMemoryError("CUDA out of memory")

            self.progress.on_progress = out_of_memory
            try:
                return original(self)
            finally:
                self.progress.on_progress = report
        return original(self)

    monkeypatch.setattr(WeightPass, "run", failing)
    assert torch.equal(run(), expected)
    assert calls[:2] == [0, 1]


def test_short_prompts_and_batches_never_write(models, tmp_path, monkeypatch):
    """By the default policy nothing is written before ten seconds."""

    def fail(*_):
        raise AssertionError("written")

    monkeypatch.setattr("ollm_core.kv.disk.checkpoints.write_unfinished", fail)
    run = Run(models("llama"), tmp_path / "kv")
    run(policy=CheckpointPolicy())
    run.kv_dir = tmp_path / "other"
    run(policy=CheckpointPolicy(least_tokens=NUM_TOKENS + 1, after_seconds=0, share=1e9))
    with ollm.load(models("llama"), device="cpu", kv="disk", kv_dir=tmp_path / "b") as model:
        model.engine.checkpoints = ALWAYS
        model(input_ids=run.prompt.expand(2, -1), logits_to_keep=1)


@pytest.mark.parametrize("options", [{"keep_kv": False}, {"kv": "host"}])
def test_what_keeps_nothing_writes_nothing(models, tmp_path, options):
    """Nothing of the user's document stays where that was not asked for."""
    directory = tmp_path / "kv"
    options = {"kv": "disk", "kv_dir": directory} | options
    seen = []

    def look(progress):
        seen.append(progress.saved_layers)

    with ollm.load(models("llama"), device="cpu", on_progress=look, **options) as model:
        model.engine.checkpoints = ALWAYS
        model(input_ids=Run(None, None).prompt, logits_to_keep=1)
    assert set(seen) == {0}
    assert not directory.exists() or list(directory.iterdir()) == []


def test_logits_that_are_no_numbers_leave_nothing(models, tmp_path, monkeypatch):
    """It would fail in the same way again."""

    def no_numbers(_):
        raise NotFiniteError("no numbers")

    run = Run(models("llama"), tmp_path / "kv")
    monkeypatch.setattr("ollm_core.engine.engine.require_finite", no_numbers)
    with pytest.raises(NotFiniteError):
        run()
    assert run.left() == []


class Saved:
    """A checkpoint that notes what it is asked for."""

    def __init__(self, clock, seconds=0.0):
        self.num_done, self.saved, self.dropped = 0, [], False
        self._clock, self._seconds = clock, seconds

    def save(self, num_done, hidden):
        self._clock.now += self._seconds
        self.saved.append(num_done)
        return True

    def drop(self):
        self.dropped = True


class Clock:
    """A clock that stands still."""

    now = 100.0

    def __call__(self):
        return self.now


def nothing():
    """Files are as they were."""


@pytest.mark.parametrize(
    ("layer_seconds", "save_seconds", "expected"),
    [
        (30.0, 0.1, [*range(1, 9)]),  # each, where a layer takes long
        (4.0, 0.1, [*range(3, 9)]),  # not before ten seconds
        (4.0, 1.0, [3]),  # one second in a hundred and more
        (40.0, 1.0, [*range(1, 9)]),
        (20.0, 1.0, [1, 3, 5, 7]),
        (1.0, 0.001, []),  # through before
    ],
)
def test_how_often(layer_seconds, save_seconds, expected):
    """Of its time at most a thirtieth, as measured."""
    clock = Clock()
    saved = Saved(clock, save_seconds)
    one = PassCheckpoint(saved, CheckpointPolicy(), nothing, clock)
    hidden = [torch.zeros(1000)]
    for num_done in range(1, 9):
        clock.now += layer_seconds
        one.after_layer(num_done, hidden)
        assert one.saved_layers == (saved.saved or [0])[-1]
    assert saved.saved == expected


def test_weights_that_were_changed_end_it():
    """What was computed so far may come of two models."""

    def changed():
        raise ReadError("changed")

    clock = Clock()
    saved = Saved(clock)
    one = PassCheckpoint(saved, CheckpointPolicy(after_seconds=0), changed, clock)
    clock.now += 50
    with pytest.raises(ReadError):
        one.after_layer(1, [torch.zeros(3)])
    assert saved.saved == []
    assert saved.dropped


def test_an_interrupt_drops_nothing_and_an_error_does():
    """Ctrl-C while the last files are looked at is no fault of the pass."""
    for error, dropped in ((KeyboardInterrupt, False), (DoesNotFitError, True)):
        saved = Saved(Clock())
        one = PassCheckpoint(saved, CheckpointPolicy(), nothing)
        with pytest.raises(error), one.dropped_if_it_fails():
            raise error("now")
        assert saved.dropped is dropped


class Asked:
    """A store that keeps checkpoints, and notes that it was asked for one."""

    def __init__(self):
        self.asked = []

    def checkpoint(self, sequence, token_ids, settings, dtypes):
        self.asked.append((sequence, len(token_ids), settings, dtypes))
        return


PLAN = PassPlan((Chunk((0,), 0, 900),), 900, "exact", False, PerMemory({}, {}))
LONG = NewTokens(3, torch.zeros(900, dtype=torch.long), 0)


@pytest.mark.parametrize(
    ("work", "hands_on", "asked"),
    [
        ([LONG], "", True),
        ([replace(LONG, start=5)], "", True),
        ([LONG], None, True),
        ([LONG], "shares", False),  # what layers hand on is nowhere written
        ([LONG], "handed", False),
        ([LONG, replace(LONG, sequence=4)], "", False),
        ([replace(LONG, kept=False)], "", False),
        ([replace(LONG, num_drafted=1)], "", False),
        ([replace(LONG, token_ids=LONG.token_ids[:500])], "", False),
        ([replace(LONG, start=5, num_logits=900)], "", True),  # a part of one that is scored
    ],
)
def test_which_passes_can_be_gone_on_with(work, hands_on, asked):
    """One sequence's long prompt, of which all that layers need is written."""
    facts = SimpleNamespace(
        shared=("keys of layer 1",) if hands_on == "shares" else (),
        handed={1: 2} if hands_on == "handed" else {},
        hidden_dtypes=frozenset({torch.float32}),
    )
    own = None if hands_on is None else SimpleNamespace(facts=facts)
    skeleton = SimpleNamespace(own=own, products=None)
    weights = SimpleNamespace(dtype=torch.bfloat16, device=torch.device("cpu"))
    store, policy = Asked(), CheckpointPolicy(least_tokens=600)
    assert checkpoint_of(store, work, PLAN, skeleton, weights, policy) is None
    assert bool(store.asked) is asked
    if asked:
        sequence, num_tokens, settings, dtypes = store.asked[0]
        assert (sequence, num_tokens) == (3, 900)
        assert dtypes == ({torch.bfloat16} if own is None else facts.hidden_dtypes)
        assert json.loads(json.dumps(settings)) == settings
    assert checkpoint_of(object(), [LONG], PLAN, skeleton, weights, policy) is None
