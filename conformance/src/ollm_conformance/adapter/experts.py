"""Checks of mixtures of experts: what is read for a pass, and how often."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ollm_conformance.adapter.base import AdapterSuite
from ollm_conformance.alike import same_model
from ollm_conformance.checks import check, does_not_apply
from ollm_conformance.compare import same_bits
from ollm_conformance.small import EXPERT_COUNTS, first_of
from ollm_conformance.subject import CHUNK, Reference, Subject
from ollm_core import ParameterSource, TensorInfo, WeightPlan
from ollm_core.testing import (
    LogicalTensors,
    StreamedModel,
    counted_reads,
    logical_tensors,
    open_checkpoint,
)

_LOOK = "layout().experts, and experts() (weights() if you wrote your own): each expert's slices"
Expert = tuple[int, int]
"""Layer and number."""


class Experts(AdapterSuite):
    """Only routed experts are read, each once for each layer in a pass."""

    @check(
        "experts.routed-only",
        "A pass reads the experts that its tokens are routed to, each once, and no other.",
        look=_LOOK,
    )
    def test_routed_only(self, subject: Subject) -> None:
        plan = _experts_of(subject)
        prompt = subject.prompt(3 * CHUNK)

        def work(model: StreamedModel) -> None:
            model(input_ids=prompt[None], logits_to_keep=1)

        least = subject.least_memory(work, subject.tiny("bfloat16"))
        reference = subject.reference("bfloat16")
        cache = reference.new_cache()
        with subject.open(subject.tiny("bfloat16"), device_memory=least) as model:
            mine = model.new_cache()
            for begin, end in ((0, 2 * CHUNK + 7), (2 * CHUNK + 7, 2 * CHUNK + 8)):
                before = model.stats
                with _routed(subject, reference) as wanted, counted_reads(model) as seen:
                    expected = reference.run(prompt[begin:end], cache=cache)
                    found = model(input_ids=prompt[None, begin:end], past_key_values=mine).logits[0]
                after = model.stats
                same_bits(found, expected, f"logits of tokens {begin} to {end}")
                asked = {expert for expert, names in plan.items() if any(seen[n] for n in names)}
                if stray := sorted(asked - wanted):
                    raise AssertionError(
                        f"tokens {begin} to {end}: expected only routed experts to be read, got "
                        f"expert {stray[0][1]} of layer {stray[0][0]} too"
                    )
                for expert in sorted(asked):
                    for name in plan[expert]:
                        assert seen[name] == 1, (
                            f"tokens {begin} to {end}, {name}: expected to be read once in the "
                            f"pass, got {seen[name]}"
                        )
                hit = after.experts_hit - before.experts_hit
                assert len(asked) + hit == len(wanted), (
                    f"tokens {begin} to {end}: expected {len(wanted)} routed experts read or "
                    "found in memory, "
                    f"got {len(asked)} read and {hit} found"
                )
            read = model.stats.experts_read
            assert read > 0, f"in {least} bytes: expected experts to be read, got {read}"

    @check(
        "experts.kept",
        "With room for all experts, each is read once, however many passes need it.",
        look=_LOOK,
    )
    def test_kept(self, subject: Subject) -> None:
        _experts_of(subject)
        prompt = subject.prompt(2 * CHUNK)
        with subject.open(subject.tiny("bfloat16")) as model:
            model(input_ids=prompt[None], logits_to_keep=1)
            first = model.stats
            model(input_ids=prompt[None], logits_to_keep=1)
            second = model.stats
        read = first.experts_read
        assert read > 0, f"first pass: expected experts to be read, got {read}"
        again = second.experts_read - first.experts_read
        assert again == 0, f"second pass: expected no expert to be read again, got {again}"
        hits = second.experts_hit - first.experts_hit
        assert hits > 0, f"second pass: expected experts to be found in memory, got {hits}"

    @check(
        "experts.many",
        "With more than ten experts, whatever number the tiny config has, the parameters and the "
        "logits are transformers', bit for bit.",
        look="experts(): by number, not by the names of tensors, where 10 comes before 2",
    )
    def test_many(self, subject: Subject) -> None:
        if not subject.adapter.layout(subject.config).experts:
            does_not_apply("the model has no experts that are read one by one")
        few = first_of(subject.config, EXPERT_COUNTS)
        if few is None:
            does_not_apply("tiny_config() states no number of experts at its top")
        if few > 10:
            does_not_apply("tiny_config() has more than ten, and other checks run it")
        more = {key: 11 for key in EXPERT_COUNTS if subject.config.get(key) == few}
        config = {**subject.config, **more}
        same_model(subject, config, f"tiny_config() with 11 experts in place of {few}", steps=1)


def _experts_of(subject: Subject) -> dict[Expert, list[str]]:
    """Each expert's tensors, or rows of them, as reading engines are asked for them."""
    layout = subject.adapter.layout(subject.config)
    if not layout.experts:
        does_not_apply("the model has no experts that are read one by one")
    directory = subject.tiny("bfloat16")
    stored, logical = open_checkpoint(directory).tensors, logical_tensors(directory)
    plan = subject.adapter.weights(subject.config, logical.names)
    found: dict[Expert, list[str]] = {}
    for layer_idx in range(layout.num_layers):
        for sources in _slices(plan, f"{layout.layers}.{layer_idx}.{layout.experts}."):
            for number, source in enumerate(sources):
                found.setdefault((layer_idx, number), []).extend(_asked(source, logical, stored))
    assert found, (
        f"layout().experts is {layout.experts!r}: expected experts() to give sources for the "
        "parameters of that module, got none"
    )
    return found


def _slices(plan: WeightPlan, path: str) -> Iterator[Sequence[ParameterSource]]:
    return (sources for name, sources in plan.experts.items() if name.startswith(path))


def _asked(source: ParameterSource, logical: LogicalTensors, stored: Any) -> list[str]:
    names = (name for tensor in source.tensors for name in logical.stored(tensor))
    infos: list[TensorInfo] = [stored[name] for name in names]
    return [info.name if source.row is None else info.row(source.row).name for info in infos]


@contextmanager
def _routed(subject: Subject, reference: Reference) -> Iterator[set[Expert]]:
    """What the un-offloaded model's routers ask for, while it runs in the `with`."""
    layout = subject.adapter.layout(subject.config)
    wanted: set[Expert] = set()

    def listen(layer_idx: int) -> Any:
        def told(_: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            wanted.update((layer_idx, number) for number in arguments[1].unique().tolist())

        return told

    hooks = []
    for layer_idx, layer in enumerate(reference.model.get_submodule(layout.layers).children()):
        if layout.experts in dict(layer.named_modules()):
            experts = layer.get_submodule(layout.experts)
            hooks.append(experts.register_forward_pre_hook(listen(layer_idx)))
    try:
        yield wanted
    finally:
        for hook in hooks:
            hook.remove()
