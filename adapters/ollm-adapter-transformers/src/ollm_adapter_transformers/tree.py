"""Finds embedding, layers, head and experts in transformers' module tree of a model, built without
data.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ollm_core import Config, Layout, UnsupportedError, empty_model, run_apart


@dataclass(frozen=True, slots=True, eq=False)
class Tree:
    """transformers' model on the meta device, and where its parts are."""

    model: Any
    """Core may run it: its modules are then other ones."""
    layout: Layout
    state: Mapping[str, Tensor]
    """What a checkpoint holds of it, by name."""
    buffers: frozenset[str]
    """Names of all buffers."""


def build_tree(config: Config, dtype: torch.dtype, told: Mapping[str, str]) -> Tree:
    """What paths of the layout are `told` is not looked for. Raises ConfigError if transformers
    cannot build a model, UnsupportedError for a tree without the usual parts.
    """
    model = empty_model(config, dtype)
    for module in model.modules():
        if getattr(module, "is_decoder", None) is False:
            what = f"sees later tokens too: is_decoder of its {type(module).__name__} is false"
            raise _error(model, what)
    paths = {id(module): path for path, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding):
        raise _error(model, "has no plain input embedding")
    if head is None or getattr(head, "weight", None) is None:
        raise _error(model, "has no output head of one module")
    path, layers = _layers(model, paths[id(embedding)], told.get("layers", ""))
    seen = {
        "embedding": paths[id(embedding)],
        "layers": path,
        "head": paths[id(head)],
        "experts": next((inside for layer in layers for inside in _experts(layer)), ""),
    }
    layout = Layout(len(layers), norm="", rotary="", own_forward=True, **{**seen, **told})
    return Tree(model, layout, dict(model.state_dict()), frozenset(dict(model.named_buffers())))


def _layers(model: Any, embedding: str, told: str) -> tuple[str, nn.ModuleList]:
    """The list of layers: the one that is `told`, else of those that are in no other list one of as
    many as the config says, the nearest to the embedding, and of these the one with most
    parameters.
    """
    lists: dict[str, nn.ModuleList] = {}
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{other}.") for other in lists)
        if isinstance(module, nn.ModuleList) and len(module) and not inside:
            lists[path] = module
    if not lists:
        raise _error(model, "has no list of layers")
    if told:
        if told not in lists:
            raise _error(model, f"has no list of layers {told!a}; it has {', '.join(lists)}")
        return told, lists[told]

    wanted = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)

    def nearness(path: str) -> tuple[bool, int, int]:
        common = 0
        for one, other in zip(path.split("."), embedding.split("."), strict=False):
            if one != other:
                break
            common += 1
        return len(lists[path]) == wanted, common, sum(p.numel() for p in lists[path].parameters())

    best = max(lists, key=nearness)
    return best, lists[best]


def _experts(layer: nn.Module) -> Iterator[str]:
    """Paths of modules with routed experts that transformers calls by its own interface: stacked,
    one slice for each expert, which core may run one by one.
    """
    for path, module in layer.named_modules():
        own = list(module.parameters(recurse=False))
        stacked = len({one.shape[0] for one in own if one.dim() > 1}) == 1
        stacked &= all(one.dim() > 1 for one in own)
        is_interface = getattr(module, "is_concatenated", None) is not None
        alone = len(own) == len(list(module.parameters()))  # an activation has none
        if path and own and stacked and is_interface and alone and run_apart(module):
            yield path


def _error(model: Any, what: str) -> UnsupportedError:
    return UnsupportedError(
        f"{type(model).__name__} {what}",
        hint="a model is run layer by layer, from an embedding to a head",
    )
