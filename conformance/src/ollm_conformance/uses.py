"""Whether an adapter's plan uses each tensor of a checkpoint once, and makes every parameter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from ollm_core import Config, ModelAdapter, OllmError


def used_once(
    adapter: ModelAdapter, config: Config, stored: set[str], parameters: Iterable[str], what: str
) -> None:
    """Raises AssertionError unless each of the `stored` tensors makes one parameter or is ignored,
    and the `parameters` are all made, and no other. `what` names the config.
    """
    try:
        layout, plan = adapter.layout(config), adapter.weights(config, sorted(stored))
    except OllmError as error:
        name = type(error).__name__
        raise AssertionError(
            f"{what}: expected its tensors to be taken, got {name}: {error}"
        ) from error
    head, embedding = f"{layout.head}.weight", f"{layout.embedding}.weight"
    tied = plan.parameters.get(head) == plan.parameters.get(embedding)
    sources = [s for name, s in plan.parameters.items() if not (tied and name == head)]
    sources += [s for slices in plan.experts.values() for s in slices]
    parts = Counter((tensor, source.row) for source in sources for tensor in source.tensors)
    uses: Counter[str] = Counter()  # a tensor used row by row is used once
    for (tensor, row), count in parts.items():
        uses[tensor] = max(uses[tensor], count) if row is not None else uses[tensor] + count
    expected = set(parameters)
    if wrong := sorted(expected ^ (plan.parameters.keys() | plan.experts.keys())):
        state = "a source, got none"
        if wrong[0] not in expected:
            state = "none, as transformers has no such parameter, got a source"
        raise AssertionError(f"{what}, parameter {wrong[0]}: expected {state}")
    for tensor in sorted(stored | uses.keys() | plan.ignored):
        times = uses[tensor] + (tensor in plan.ignored)
        if tensor not in stored and uses[tensor]:
            raise AssertionError(f"{what}: expected tensors of the checkpoint, got {tensor}")
        if tensor in stored and times != 1:
            raise AssertionError(
                f"{what}, tensor {tensor}: expected to be used or ignored once, got {times} times"
            )
