"""Checks of which checkpoint tensor goes where."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from ollm_conformance.adapter.base import AdapterSuite
from ollm_conformance.bound import bound_parameters
from ollm_conformance.checks import check, does_not_apply
from ollm_conformance.compare import same_bits
from ollm_conformance.naming import parameter_names, stored_shapes
from ollm_conformance.subject import Subject, meta_model
from ollm_core import CheckpointError, Config, ModelAdapter
from ollm_core.checkpoint import open_checkpoint
from ollm_core.generation import StreamedModel

_LOOK = "weights(): the tensors and the transform of the parameter"


class Weights(AdapterSuite):
    """Every tensor used once, in the right place, as it is."""

    @check(
        "weights.every-tensor-once",
        "Each tensor of the tiny checkpoint makes one parameter or is listed as ignored.",
        look=_LOOK,
    )
    @pytest.mark.parametrize("shards", [False, True])
    def test_every_tensor_once(self, subject: Subject, shards: bool) -> None:
        stored = open_checkpoint(subject.tiny(shards=shards)).tensors
        _used_once(subject.adapter, subject.config, set(stored))

    @check(
        "weights.catalog-complete",
        "Each tensor of every model in the catalog makes one parameter or is listed as ignored.",
        look=_LOOK,
    )
    def test_catalog_complete(self, subject: Subject) -> None:
        entries = subject.adapter.catalog()
        if not entries:
            does_not_apply("the catalog is empty")
        for entry in entries:
            _used_once(subject.adapter, entry.config, set(stored_shapes(entry.config)))

    @check(
        "weights.values",
        "Every parameter has, bit for bit, the values that transformers loads for it.",
        look=_LOOK,
    )
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_values(self, subject: Subject, dtype: str) -> None:
        expected = dict(subject.reference(dtype).model.named_parameters(remove_duplicate=False))
        layout = subject.adapter.layout(subject.config)
        with subject.open(subject.tiny(dtype)) as model:
            model(input_ids=subject.prompt(4)[None])
            for name, found in bound_parameters(model, layout):
                same_bits(found, expected.pop(name).data, f"parameter {name}")
        assert not expected, f"expected every parameter, got none for {sorted(expected)[0]}"

    @check(
        "weights.missing-tensor",
        "A checkpoint that lacks a tensor is refused with an error that names it.",
        look="weights(): raise CheckpointError for what is not in `tensor_names`",
    )
    def test_missing_tensor(self, subject: Subject) -> None:
        names = set(stored_shapes(subject.config))
        for name in _one_of_each(names):
            with pytest.raises(CheckpointError) as refused:
                subject.adapter.weights(subject.config, sorted(names - {name}))
            assert name in str(refused.value), (
                f"expected an error that names {name}, got: {refused.value}"
            )

    @check(
        "weights.foreign-tensor",
        "A checkpoint with a tensor that the family does not have is refused, not half used.",
        look="weights(): raise CheckpointError for a name that is neither used nor known to ignore",
    )
    def test_foreign_tensor(self, subject: Subject) -> None:
        names = sorted(stored_shapes(subject.config))
        layers = subject.adapter.layout(subject.config).num_layers
        beyond = re.sub(r"\.\d+\.", f".{layers}.", next(n for n in names if ".0." in n), count=1)
        for foreign in ("model.strange.weight", f"{names[0]}.lora_A", beyond):
            with pytest.raises(CheckpointError) as refused:
                subject.adapter.weights(subject.config, [*names, foreign])
            assert foreign in str(refused.value), (
                f"expected an error that names {foreign}, got: {refused.value}"
            )

    @check(
        "weights.tied-head",
        "A tied head is the embedding's tensor, stored once or twice; an untied one its own.",
        look="weights(): tie_word_embeddings",
    )
    @pytest.mark.parametrize("tied", [False, True])
    def test_tied_head(self, subject: Subject, tied: bool) -> None:
        changes = {"tie_word_embeddings": tied}
        directory = subject.tiny(changes=changes)
        config = {**subject.config, **changes}
        layout = subject.adapter.layout(config)
        embedding, head = f"{layout.embedding}.weight", f"{layout.head}.weight"
        directories = [directory]
        if tied:
            stored = subject.adapter.weights(config, open_checkpoint(directory).tensors)
            (table,) = stored.parameters[embedding].tensors
            directories.append(_with_head(directory, "same", head, lambda ts: ts[table].clone()))
        prompt = subject.prompt(40)
        expected = subject.reference(directory=directory).run(prompt)
        for place in directories:
            found = subject.adapter.weights(config, open_checkpoint(place).tensors).parameters
            assert (found[head] == found[embedding]) is tied, (
                f"tie_word_embeddings = {tied}: expected {'one tensor' if tied else 'two tensors'} "
                f"for embedding and head, got {found[embedding].tensors} and {found[head].tensors}"
            )
            with subject.open(place) as model:
                same_bits(model(input_ids=prompt[None]).logits[0], expected, f"logits, tied={tied}")

    @check(
        "weights.head-differs",
        "A tied model whose checkpoint holds another head than its embedding has both, as "
        "transformers has it.",
        look="weights(): with tie_word_embeddings the embedding keeps its own tensor, and the "
        "head's own one is ignored",
    )
    def test_head_differs(self, subject: Subject) -> None:
        changes = {"tie_word_embeddings": True}
        config = {**subject.config, **changes}
        layout = subject.adapter.layout(config)
        embedding, head = f"{layout.embedding}.weight", f"{layout.head}.weight"
        model = meta_model(config)
        if model.get_parameter(head) is not model.get_parameter(embedding):
            does_not_apply("transformers ties no head of this family")
        directory = subject.tiny(changes=changes)
        stored = subject.adapter.weights(config, open_checkpoint(directory).tensors)
        (table,) = stored.parameters[embedding].tensors
        directory = _with_head(directory, "other", head, lambda ts: ts[table].flip(0).clone())
        prompt = subject.prompt(40)
        expected = subject.reference(directory=directory).run(prompt)
        with subject.open(directory) as opened:
            same_bits(opened(input_ids=prompt[None]).logits[0], expected, "logits, another head")

    @check(
        "weights.sharded",
        "A checkpoint in several files gives the logits of one in a single file.",
        look="weights(): nothing in it may depend on files",
    )
    def test_sharded(self, subject: Subject) -> None:
        directory = subject.tiny("bfloat16", shards=True)
        number = len(list(directory.glob("*.safetensors")))
        assert number > 2, f"expected several shards to test with, got {number}"
        prompt = subject.prompt(40)
        with subject.open(directory) as model:
            found = model(input_ids=prompt[None]).logits[0]
        same_bits(found, subject.reference("bfloat16").run(prompt), "logits of the shards")

    @check(
        "weights.read-once",
        "A pass reads what is not kept in memory once, whatever the prompt, and not a byte more.",
        look="weights(): a tensor that several layers name is read for each of them",
    )
    def test_read_once(self, subject: Subject) -> None:
        def work(model: StreamedModel) -> None:
            model(input_ids=subject.prompt(300)[None], logits_to_keep=1)

        directory = subject.tiny("bfloat16")
        stored = open_checkpoint(directory).total_bytes
        least = subject.least_memory(work, directory=directory)
        with subject.open(directory, device_memory=least) as model:
            work(model)
            before = model.stats
            for _ in range(4):
                work(model)
            after = model.stats
            units = list(model.weights.units)
            for experts in model.weights.expert_units.values():
                units.extend(experts)
        pages = 2 * 4096 * sum(len(unit.tensors) for unit in units)
        most = stored - after.resident_bytes + pages
        passes = after.weight_passes - before.weight_passes
        found = (after.weight_bytes_read - before.weight_bytes_read) / passes
        assert passes == 4, f"expected one weight pass for each call, got {passes} for 4"
        assert found <= most, f"expected at most {most} bytes read in a pass, got {found:.0f}"


def _used_once(adapter: ModelAdapter, config: Config, stored: set[str]) -> None:
    layout, plan = adapter.layout(config), adapter.weights(config, sorted(stored))
    head, embedding = f"{layout.head}.weight", f"{layout.embedding}.weight"
    tied = plan.parameters.get(head) == plan.parameters.get(embedding)
    sources = [s for name, s in plan.parameters.items() if not (tied and name == head)]
    sources += [s for slices in plan.experts.values() for s in slices]
    parts = Counter((tensor, source.row) for source in sources for tensor in source.tensors)
    uses: Counter[str] = Counter()  # a tensor used row by row is used once
    for (tensor, row), count in parts.items():
        uses[tensor] = max(uses[tensor], count) if row is not None else uses[tensor] + count
    expected = set(parameter_names(config))
    if wrong := sorted(expected ^ (plan.parameters.keys() | plan.experts.keys())):
        state = "got none" if wrong[0] in expected else "which transformers does not have, got one"
        raise AssertionError(f"expected a source for each parameter; {wrong[0]}: {state}")
    for tensor in sorted(stored | uses.keys() | plan.ignored):
        times = uses[tensor] + (tensor in plan.ignored)
        if tensor not in stored and uses[tensor]:
            raise AssertionError(f"expected tensors of the checkpoint, got {tensor}")
        if tensor in stored and times != 1:
            raise AssertionError(f"{tensor}: expected to be used or ignored once, got {times}")


def _one_of_each(names: set[str]) -> list[str]:
    """Names that differ in more than numbers, the last of each kind."""
    return sorted({re.sub(r"\d+", "0", name): name for name in sorted(names)}.values())


def _with_head(
    directory: Path, kind: str, head: str, make: Callable[[dict[str, Tensor]], Tensor]
) -> Path:
    """A copy of a checkpoint that also holds a tensor for the tied head, as some do, made from the
    others.
    """
    copy = directory.with_name(f"{directory.name}-{kind}-head")
    if not copy.is_dir():
        shutil.copytree(directory, copy)
        (file,) = copy.glob("*.safetensors")
        tensors = load_file(file)
        save_file({**tensors, head: make(tensors)}, file, metadata={"format": "pt"})
    return copy
