"""Which tensors of a checkpoint make which parameter: by transformers' own conversion of
checkpoints, turned into sources that are read directly.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from ollm_adapter_transformers.tree import Tree
from ollm_core import CheckpointError, ParameterSource, UnsupportedError, WeightPlan

_FREQUENCIES = r"(^|\.)(rotary_emb|rotary_pos_emb|rope|rotary)\.inv_freq$"
"""What older transformers stored, and no model reads."""


_LANGUAGE = re.compile(r"(^|\.)(language_model|text_model)\.|^lm_head\.")
"""What the names of a language model's tensors have in a larger model's checkpoint."""


@dataclass(eq=False, slots=True)
class _Gathered:
    """The tensors of one parameter, or of several that one conversion makes."""

    converter: WeightConverter | None
    tensors: dict[str, list[str]] = field(default_factory=dict)
    """By the pattern that they match, in transformers' order."""


def plan_weights(
    tree: Tree,
    tensor_names: Sequence[str],
    *,
    is_part: bool,
    renamed: Mapping[str, str],
    ignored: Sequence[str],
) -> WeightPlan:
    """`is_part`: the checkpoint holds a larger model, of which the others are ignored. `renamed`
    and `ignored` are those of the FamilyAdapter. Raises CheckpointError for a tensor that is
    missing or foreign, UnsupportedError for a conversion that cannot be done piece by piece.
    """
    model, state = tree.model, tree.state
    superfluous = {name for name in tensor_names if any(re.search(one, name) for one in ignored)}
    stored = {
        name: _as_transformers(name, is_part, renamed)
        for name in tensor_names
        if name not in superfluous
    }
    if len(set(stored.values())) < len(stored):
        raise CheckpointError("two tensors of the checkpoint are one of the language model's")
    gathered, foreign = _gather(model, state, stored)
    found: dict[str, ParameterSource] = {}
    experts: dict[str, tuple[ParameterSource, ...]] = {}
    inside = f".{tree.layout.experts}."
    for target, one in gathered.items():
        for name, source in _sources(tree, target, one):
            if tree.layout.experts and inside in name and name.startswith(tree.layout.layers):
                experts[name] = _expert_sources(source, state[name])
            else:
                found[name] = source
    tied = model.all_tied_weights_keys
    for name, original in tied.items():
        if original in found:
            found.setdefault(name, found[original])
            if name.rpartition(".")[2] == "weight":
                found[name] = found[original]
        elif name in found:
            found[original] = found[name]
    lacking = set(state) - set(found) - set(experts)
    missing = sorted(name for name in lacking if tied.get(name) not in lacking)
    if missing:
        gone = _not_stored(tree, stored.values()) or missing
        raise CheckpointError(
            f"the checkpoint lacks what makes {gone[0]} ({len(missing)} parameters in all)"
            + (f" and has {foreign[0]!a}, which this model does not have" if foreign else ""),
            hint="config.json and the checkpoint are of different models, or a file is missing",
        )
    plan = WeightPlan(found, experts=experts)
    used = {tensor for source in plan.sources() for tensor in source.tensors}
    unused = [name for name in tensor_names if name not in used]
    patterns = [_FREQUENCIES, *(model._keys_to_ignore_on_load_unexpected or ())]
    aliases = set(tied)
    wrong = [
        name
        for name in unused
        if name not in superfluous
        and not (is_part and _LANGUAGE.search(name) is None)
        and not any(re.search(pattern, name) for pattern in patterns)
        and stored[name] not in aliases
        and name not in _renamed_to(gathered, aliases)
        and not _is_buffer(tree, stored[name])
    ]
    if wrong:
        raise CheckpointError(
            f"the checkpoint has tensor {wrong[0]!a}, which no {model.config.model_type} model of "
            f"this config has ({len(wrong)} such in all)",
            hint="config.json and the checkpoint are of different models",
        )
    return WeightPlan(found, frozenset(unused), experts)


def _not_stored(tree: Tree, names: Collection[str]) -> list[str]:
    """Tensors that transformers would save and that are not among `names`, where it can be told."""
    try:
        return sorted(saved_tensors(tree, "").keys() - set(names))
    except UnsupportedError:
        return []


def saved_tensors(tree: Tree, dtype: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """dtype and shape of the tensors that transformers would save, by name."""
    model, state = tree.model, dict(tree.state)
    for name in model.all_tied_weights_keys:
        state.pop(name, None)
    try:
        saved = revert_weight_conversion(model, state)
    except Exception as error:
        raise UnsupportedError(
            f"what a checkpoint of {type(model).__name__} holds cannot be told from config.json: "
            f"{' '.join(str(error).split())}",
            hint="plan a directory that holds the weights",
        ) from error
    kept = model._get_dtype_plan(model.dtype)  # what it loads, and so saves, in a dtype of its own
    return {
        name: ("F32" if _is_kept(name, value, model.dtype, kept) else dtype, tuple(value.shape))
        for name, value in saved.items()
    }


def _is_kept(name: str, value: Tensor, dtype: torch.dtype, kept: Mapping[str, torch.dtype]) -> bool:
    """Whether a tensor is in float32 in a model of another `dtype`: made so, or planned so."""
    planned = (one for pattern, one in kept.items() if re.search(pattern.replace("*", ".*"), name))
    return next(planned, value.dtype) == torch.float32 != dtype


def _as_transformers(name: str, is_part: bool, renamed: Mapping[str, str]) -> str:
    """The name of a tensor in a checkpoint that transformers saved of the language model alone."""
    for pattern, instead in renamed.items():
        name = re.sub(pattern, instead, name)
    return re.sub(r"(^|\.)(language_model|text_model)\.", r"\1", name, count=1) if is_part else name


def _gather(
    model: Any, state: Mapping[str, Tensor], stored: Mapping[str, str]
) -> tuple[dict[str, _Gathered], list[str]]:
    """The tensors of each parameter, by the first parameter that a conversion makes, and those that
    are of none, as `convert_and_load_state_dict_in_model` of transformers does. `stored` has each
    tensor's name in a checkpoint of the language model alone.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    prefix = model.base_model_prefix
    gathered: dict[str, _Gathered] = {}
    foreign: list[str] = []
    for tensor in sorted(stored, key=lambda name: dot_natural_key(stored[name])):
        given = stored[tensor]
        name, pattern = rename_source_key(given, renamings, converters, prefix, state)  # type: ignore[arg-type]
        if name not in state and given in state:
            name, pattern = rename_source_key(given, [], [], prefix, state)  # type: ignore[arg-type]
        if name not in state:
            foreign.append(tensor)
            continue
        converter = None if pattern is None else by_pattern[pattern]
        one = gathered.setdefault(name, _Gathered(converter))
        one.tensors.setdefault(pattern or tensor, []).append(tensor)
    return gathered, foreign


def _sources(tree: Tree, target: str, gathered: _Gathered) -> list[tuple[str, ParameterSource]]:
    """What makes each parameter of one conversion."""
    names = tuple(name for group in gathered.tensors.values() for name in group)
    if gathered.converter is None:
        if len(names) > 1:
            raise CheckpointError(f"{names[0]!a} and {names[1]!a} are both {target}")
        return [(target, ParameterSource(names))]
    counts = {pattern: len(group) for pattern, group in gathered.tensors.items()}
    made = _made(tree, target, gathered)
    all_bytes = sum(tree.state[name].nbytes for name in made)
    found = []
    for name in made:
        convert = _Convert(gathered.converter, tuple(counts.items()), target, name, tree.model)
        if convert.stacks and all(
            getattr(one, "dim", 1) for one in convert.converter.operations[1:]
        ):
            _check_experts(names, convert.counts, len(tree.state[name]))
        scratch = convert.scratch_bytes(all_bytes, tree.state[name].nbytes)
        found.append((name, ParameterSource(names, convert, scratch)))
    return found


def _made(tree: Tree, target: str, gathered: _Gathered) -> list[str]:
    """The parameters that a conversion makes, beginning with `target`."""
    assert gathered.converter is not None, "asked for a conversion"
    patterns = gathered.converter.target_patterns
    first = patterns[0]
    names = []
    for pattern in patterns:
        if "*" in pattern:
            raise UnsupportedError(
                f"{type(tree.model).__name__}: the conversion of its checkpoints makes {pattern!a} "
                "of one tensor, which is not supported",
                hint="save the model again with this transformers",
            )
        if first in target:
            names.append(target.replace(first, pattern, 1))
        elif len(patterns) == 1:
            names.append(target)
    return [name for name in names if name in tree.state] or [target]


def _expert_sources(source: ParameterSource, stack: Tensor) -> tuple[ParameterSource, ...]:
    """What makes each expert's slice of a stacked parameter."""
    convert, num_experts = source.transform, len(stack)
    each_bytes = stack.nbytes // num_experts
    if convert is None:  # stored as it is: a row of one tensor
        return tuple(ParameterSource(source.tensors, row=i) for i in range(num_experts))
    assert isinstance(convert, _Convert), "made above"
    if convert.stacks:
        if len(convert.converter.operations) == 1:  # one tensor each, as it is
            return tuple(ParameterSource((name,)) for name in source.tensors)
        of_one = convert.of_one()
        scratch = of_one.scratch_bytes(each_bytes, each_bytes)
        return tuple(
            ParameterSource(source.tensors[i::num_experts], of_one, scratch)
            for i in range(num_experts)
        )
    if all(count == 1 for _, count in convert.counts):
        # Stacked already: each row is converted alone, as a stack of one.
        of_row = convert.of_row()
        scratch = of_row.scratch_bytes(each_bytes, each_bytes)
        return tuple(
            ParameterSource(source.tensors, of_row, scratch, row=i) for i in range(num_experts)
        )
    raise UnsupportedError(
        f"the experts of {convert.name} are stored in {convert.counts} tensors, which cannot be "
        "read one by one"
    )


def _check_experts(
    names: Sequence[str], counts: Sequence[tuple[str, int]], num_experts: int
) -> None:
    """Raises CheckpointError unless each pattern of a conversion matches a tensor of each expert:
    the last number in its name says of which.
    """
    left = iter(names)
    for _, count in counts:
        group = [next(left) for _ in range(count)]
        before, _, after = re.split(r"(?<=\.)(\d+)(?=\.(?!.*\.\d+\.))", group[0], maxsplit=1)
        wanted = {f"{before}{i}{after}" for i in range(num_experts)}
        for name in sorted(wanted.symmetric_difference(group), key=dot_natural_key):
            what = "lacks" if name in wanted else "has"
            raise CheckpointError(
                f"the checkpoint {what} tensor {name!a}, and the model has {num_experts} experts",
                hint="config.json and the checkpoint are of different models, or a file is missing",
            )


class _StackOfOne(MergeModulelist):
    """In place of a stack whose other tensors are not there: nothing is copied."""

    def convert(  # type: ignore[override]  # which is decorated
        self, input_dict: Any, source_patterns: Any, target_patterns: Any, **options: Any
    ) -> Any:
        count = len(input_dict)
        return {
            self.get_target_pattern(count, pattern, target_patterns): tensors[0][None]
            for pattern, tensors in input_dict.items()
        }


@dataclass(frozen=True, slots=True)
class _Convert:
    """A transform: transformers' own operations on the tensors of one conversion."""

    converter: WeightConverter = field(compare=False)  # made anew for each model
    counts: tuple[tuple[str, int], ...]
    """How many tensors match each pattern."""
    target: str
    name: str
    """Of the parameter that is wanted."""
    model: Any = field(compare=False)
    row: bool = False
    """Whether each tensor is a row of a stack, and so is what is made."""
    slice: bool = False
    """Whether only one of what is stacked is given."""

    @property
    def stacks(self) -> bool:
        """Whether tensors are stacked along a new first dimension before all else."""
        first = self.converter.operations[0]
        return isinstance(first, MergeModulelist) and first.dim == 0

    def scratch_bytes(self, all_bytes: int, own_bytes: int) -> int:
        """The most that is there beside the arguments and the parameter of `own_bytes`: what the
        operations hand to each other, `all_bytes`, and the other parameters that they make.
        """
        copying = len(self.converter.operations) - (self.slice and self.stacks)
        return (all_bytes if copying > 1 else 0) + all_bytes - own_bytes

    def of_one(self) -> _Convert:
        """The same for one of each group that is stacked."""
        counts = tuple((pattern, 1) for pattern, _ in self.counts)
        return _Convert(self.converter, counts, self.target, self.name, self.model, slice=True)

    def of_row(self) -> _Convert:
        """The same for one row of each tensor."""
        return _Convert(
            self.converter, self.counts, self.target, self.name, self.model, row=True, slice=True
        )

    def __call__(self, *tensors: Tensor) -> Tensor:
        converter = copy.deepcopy(self.converter)
        if self.slice and self.stacks:
            converter.operations[0] = _StackOfOne()
        left = iter(tensors)
        for pattern, count in self.counts:
            for _ in range(count):
                one = next(left)
                ready = _ready(one[None] if self.row else one)
                converter.add_tensor(self.target, pattern, pattern, ready)  # type: ignore[arg-type]
        with torch.no_grad():
            made: Mapping[str, Any] = converter.convert(
                self.target, model=self.model, config=self.model.config
            )
        value = made.get(self.name)
        if value is None and len(made) == 1:
            value = next(iter(made.values()))
        value = value[0] if isinstance(value, list) else value
        if value is None:
            raise CheckpointError(f"the conversion of {self.target} makes no {self.name}")
        result: Tensor = value[0] if self.slice else value
        return result


def _ready(value: Tensor) -> Callable[[], Tensor]:
    return lambda: value


def _renamed_to(gathered: Mapping[str, _Gathered], names: set[str]) -> set[str]:
    """The tensors of parameters that are tied to others."""
    return {
        tensor
        for name in names
        if name in gathered
        for group in gathered[name].tensors.values()
        for tensor in group
    }


def _is_buffer(tree: Tree, tensor: str) -> bool:
    """Whether a tensor is a buffer that the model makes itself, as masks of older checkpoints."""
    return any(tensor == name or name.endswith(f".{tensor}") for name in tree.buffers)
