"""Checks of which checkpoint tensor goes where."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from ollm_conformance.adapter.base import AdapterSuite
from ollm_conformance.alike import same_parameters
from ollm_conformance.checks import check, does_not_apply
from ollm_conformance.compare import refused, same_bits
from ollm_conformance.models import meta_model
from ollm_conformance.naming import kept_names, one_of_each
from ollm_conformance.subject import Subject
from ollm_conformance.uses import used_once
from ollm_core import CheckpointError
from ollm_core.testing import (
    StreamedModel,
    TierTracker,
    logical_tensors,
    open_checkpoint,
    weight_tensors,
)

_MINE = "(weights() if you wrote your own)"
_LOOK = f"layer_parameters(), source(), experts() {_MINE}: names, tensors and transforms"


class Weights(AdapterSuite):
    """Every tensor used once, in the right place, as it is."""

    @check(
        "weights.every-tensor-once",
        "Each tensor of the tiny checkpoint makes one parameter or is listed as ignored.",
        look=_LOOK,
    )
    @pytest.mark.parametrize("shards", [False, True])
    def test_every_tensor_once(self, subject: Subject, shards: bool) -> None:
        names = logical_tensors(subject.tiny(shards=shards)).names
        made = kept_names(subject, subject.config).parameters
        used_once(subject.adapter, subject.config, set(names), made, "tiny_config()")

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
            names = kept_names(subject, entry.config)
            stored = set(names.forms)
            used_once(subject.adapter, entry.config, stored, names.parameters, entry.id)

    @check(
        "weights.values",
        "Every parameter has, bit for bit, the values that transformers loads for it.",
        look=_LOOK,
    )
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_values(self, subject: Subject, dtype: str) -> None:
        with subject.open(subject.tiny(dtype)) as model:
            model(input_ids=subject.prompt(4)[None])
            same_parameters(subject, model, subject.config, subject.reference(dtype), dtype)

    @check(
        "weights.missing-tensor",
        "A checkpoint that lacks a tensor is refused with an error that names it.",
        look=f"layer_parameters() and source() {_MINE}: raise CheckpointError for what is missing",
    )
    def test_missing_tensor(self, subject: Subject) -> None:
        names = kept_names(subject, subject.config).forms.keys()
        for name in one_of_each(names):
            with refused(CheckpointError, f"tiny_config(), without tensor {name}") as refusal:
                subject.adapter.weights(subject.config, sorted(names - {name}))
            refusal.says(name)

    @check(
        "weights.foreign-tensor",
        "A checkpoint with a tensor that the family does not have is refused, not half used.",
        look=f"ignores() {_MINE}: raise CheckpointError for what is neither used nor superfluous",
    )
    def test_foreign_tensor(self, subject: Subject) -> None:
        names = sorted(kept_names(subject, subject.config).forms)
        layers = subject.adapter.layout(subject.config).num_layers
        beyond = re.sub(r"\.\d+\.", f".{layers}.", next(n for n in names if ".0." in n), count=1)
        for foreign in ("model.strange.weight", f"{names[0]}.lora_A", beyond):
            with refused(CheckpointError, f"tiny_config(), with tensor {foreign}") as refusal:
                subject.adapter.weights(subject.config, [*names, foreign])
            refusal.says(foreign)

    @check(
        "weights.tied-head",
        "A tied head is the embedding's tensor, stored under either name or both; an untied one "
        "its own, without which a checkpoint is refused.",
        look=f"defaults, for tie_word_embeddings, and source() {_MINE}",
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
            stored = subject.adapter.weights(config, logical_tensors(directory).names)
            (table,) = stored.parameters[embedding].tensors
            directories.append(_with_head(directory, "same", head, lambda ts: ts[table].clone()))
            directories.append(_with_head(directory, "alone", head, lambda ts: ts.pop(table)))
        else:
            names = logical_tensors(directory).names
            own = subject.adapter.weights(config, names).parameters[head].tensors
            with refused(CheckpointError, f"tie_word_embeddings = False, without {own[0]}"):
                subject.adapter.weights(config, sorted(set(names) - set(own)))
        prompt = subject.prompt(40)
        expected = subject.reference(directory=directory).run(prompt)
        for place in directories:
            found = subject.adapter.weights(config, logical_tensors(place).names).parameters
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
        look=f"source() {_MINE}: with tie_word_embeddings the embedding keeps its own tensor, and "
        "the head's own one is ignored",
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
        stored = subject.adapter.weights(config, logical_tensors(directory).names)
        (table,) = stored.parameters[embedding].tensors
        directory = _with_head(directory, "other", head, lambda ts: ts[table].flip(0).clone())
        prompt = subject.prompt(40)
        expected = subject.reference(directory=directory).run(prompt)
        with subject.open(directory) as opened:
            same_bits(opened(input_ids=prompt[None]).logits[0], expected, "logits, another head")

    @check(
        "weights.sharded",
        "A checkpoint in several files gives the logits of one in a single file.",
        look=f"source() {_MINE}: nothing in it may depend on files",
    )
    def test_sharded(self, subject: Subject) -> None:
        directory = subject.tiny("bfloat16", shards=True)
        number = len(list(directory.glob("*.safetensors")))
        assert number > 2, f"tiny_config(): expected a model of several shards, got {number}"
        prompt = subject.prompt(40)
        with subject.open(directory) as model:
            found = model(input_ids=prompt[None]).logits[0]
        same_bits(found, subject.reference("bfloat16").run(prompt), "logits of the shards")

    @check(
        "weights.scratch",
        "A transform holds no more beside its tensors and the parameter than its scratch_bytes, "
        "however small.",
        look=f"scratch_bytes of source() and experts() {_MINE}: copies in float32, parts that are "
        "joined",
    )
    def test_scratch(self, subject: Subject) -> None:
        (file,) = subject.tiny("bfloat16").glob("*.safetensors")
        stored = load_file(file)
        names = logical_tensors(file.parent).names
        plan = subject.adapter.weights(subject.config, names)
        made = dict(plan.parameters) | {name: one[0] for name, one in plan.experts.items()}
        transformed = (
            name
            for name, source in made.items()
            if source.transform and stored.keys() >= set(source.tensors)
        )
        for name in one_of_each(transformed):
            source = made[name]
            whole = [stored[tensor] for tensor in source.tensors]
            raw = whole if source.row is None else [one[source.row] for one in whole]
            with TierTracker(kv_on_device=True) as tracker:
                value = cast("Callable[..., Tensor]", source.transform)(*raw)
            result = value.untyped_storage().nbytes()
            given = {tensor.untyped_storage().data_ptr() for tensor in whole}
            held = tracker.peak - (0 if value.untyped_storage().data_ptr() in given else result)
            assert held <= source.scratch_bytes, (
                f"parameter {name}, from {len(raw)} tensors in bfloat16: expected at most its "
                f"scratch_bytes, {source.scratch_bytes}, beside its {result} bytes, got {held}"
            )

    @check(
        "weights.read-once",
        "A pass reads what is not kept in memory once, whatever the prompt, and not a byte more.",
        look=f"source() {_MINE}: a tensor that several layers name is read for each of them",
    )
    def test_read_once(self, subject: Subject) -> None:
        def work(model: StreamedModel) -> None:
            model(input_ids=subject.prompt(150)[None], logits_to_keep=1)

        directory = subject.tiny("bfloat16")
        stored = open_checkpoint(directory).total_bytes
        least = subject.least_memory(work, directory=directory)
        with subject.open(directory, device_memory=least) as model:
            work(model)
            before = model.stats
            for _ in range(4):
                work(model)
            after = model.stats
            pages = 2 * 4096 * len(weight_tensors(model))
        most = stored - after.resident_bytes + pages
        passes = after.weight_passes - before.weight_passes
        found = (after.weight_bytes_read - before.weight_bytes_read) / passes
        assert passes == 4, f"4 calls: expected one weight pass for each, got {passes}"
        assert found <= most, (
            f"a pass in {least} bytes: expected at most {most} bytes read, got {found:.0f}"
        )


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
        made = make(tensors)
        save_file({**tensors, head: made}, file, metadata={"format": "pt"})
    return copy
