"""Mixtures of experts: a layer in two halves, so that each routed expert is needed once per pass.

First the mixer and the router see all chunks; then it is known which experts are wanted, and each
of these serves all chunks before the next comes. A single chunk, as in decoding, goes through in
one go, its experts fetched from inside the layer. An expert is computed by the family's own eager
code, on the tokens routed to it, in the order in which that code takes them; the outputs are added
per chunk in the order of the experts. So every bit is that of the un-offloaded model.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ollm_core.contracts.model import Layout
from ollm_core.device.offload import ActivationOffload
from ollm_core.errors import UnsupportedError
from ollm_core.products.products import CpuProducts

Fetch = Callable[
    [Mapping[int, int]], AbstractContextManager[Iterator[tuple[int, Sequence[Tensor]]]]
]
"""Experts by number, and how many tokens go to each -> their parameters one after another, as
`WeightStreamer.experts` gives.
"""


@dataclass(eq=False, slots=True)
class RoutedChunk:
    """One chunk of N tokens between router and experts. Its tensors stay where hidden states are
    offloaded.
    """

    states: Tensor
    """[N, C], what the experts take."""
    tokens: Tensor
    """[N * K], each expert's tokens side by side, in the order in which eager code takes them."""
    weights: Tensor
    """[N * K], the router's, in that order."""
    starts: Tensor
    """[E + 1], where each expert's part begins; on the CPU."""
    total: Tensor
    """[N, C], the experts' outputs added up so far."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all of it."""
        parts = self.states, self.tokens, self.weights, self.starts, self.total
        return sum(part.nbytes for part in parts)


class _Asked(Exception):
    """Leaves a layer at its experts, with what they were asked."""

    def __init__(self, states: Tensor, index: Tensor, weights: Tensor) -> None:
        super().__init__()
        self.arguments = states, index, weights


class _StandIn(nn.Module):
    """Stands in a layer where its experts were."""

    def __init__(self) -> None:
        super().__init__()
        self._answer: Callable[[Tensor, Tensor, Tensor], Tensor] = _leave

    def forward(self, states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """`states` [N, C], `index` and `weights` [N, K] -> [N, C]."""
        return self._answer(states, index, weights)

    @contextmanager
    def answering(self, answer: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Iterator[None]:
        """In the `with`, `answer` is called; outside, the layer is left."""
        self._answer = answer
        try:
            yield
        finally:
            self._answer = _leave


def _leave(states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    raise _Asked(states, index, weights)


def _do_nothing(states: Tensor, *_: Tensor) -> Tensor:
    return torch.empty_like(states)


class _Slice:
    """A stacked parameter of which one expert's slice is there."""

    def __init__(self, value: Tensor) -> None:
        self._value = value

    def __getitem__(self, _: object) -> Tensor:
        return self._value


class Mixture:
    """One layer with routed experts. Its dense parameters are bound by the skeleton, those of the
    experts here.
    """

    def __init__(
        self, layer: nn.Module, layout: Layout, products: CpuProducts | None = None
    ) -> None:
        """Puts a stand-in into `layer` in place of its experts, whose products are then `products`.
        Raises UnsupportedError for experts
        that are not slices of stacked parameters.
        """
        path, _, leaf = layout.experts.rpartition(".")
        holder = layer.get_submodule(path)
        self._layer = layer
        self._products = products
        self._family = holder.get_submodule(leaf)
        self._slots: Any = self._family._parameters  # slices are no tensors
        names = [name for name, _ in self._family.named_parameters()]
        shapes = [tuple(parameter.shape) for parameter in self._family.parameters()]
        if any("." in name for name in names) or len({shape[:1] for shape in shapes}) != 1:
            raise UnsupportedError(
                f"the experts in {type(self._family).__name__} are not stacked, one slice each"
            )
        self._names = tuple(names)
        self._stand_in = _StandIn()
        setattr(holder, leaf, self._stand_in)
        self._mixer: Callable[..., Tensor] = layout.mixer or standard_mixer
        self._mlp: Callable[[nn.Module, Tensor], Tensor] = layout.mlp or standard_mlp
        self.num_experts = shapes[0][0]
        self.slice_shapes = tuple(shape[1:] for shape in shapes)
        """Of one expert's parameters, in the order of the module's."""

    def mixer(self, hidden: Tensor, **options: Any) -> Tensor:
        """The first half of the layer, with the layer's own arguments: [R, T, C] -> the same."""
        return self._mixer(self._layer, hidden, **options)

    def whole(self, hidden: Tensor, **options: Any) -> Tensor:
        """The layer as transformers calls it, [R, T, C] -> the same, with experts that do
        nothing.
        """
        with self._stand_in.answering(_do_nothing):
            output: Tensor = self._layer(hidden, **options)
        return output

    def idle(self) -> AbstractContextManager[None]:
        """In the `with`, the layer may be called, with experts that do nothing."""
        return self._stand_in.answering(_do_nothing)

    @contextmanager
    def serving(self, serve: Callable[[RoutedChunk, ActivationOffload], None]) -> Iterator[None]:
        """In the `with`, the layer may be called: `serve` adds up what a chunk's experts say."""

        def answer(states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
            here = ActivationOffload(states.device, on_host=False)
            chunk = self._routed(states, index, weights, here)
            serve(chunk, here)
            return chunk.total

        with self._stand_in.answering(answer):
            yield

    def fetching(self, fetch: Fetch) -> AbstractContextManager[None]:
        """In the `with`, the layer may be called: it fetches the experts that it wants."""
        return self.serving(lambda chunk, at: self._serve([chunk], at, fetch))

    def halves(self, hidden: Tensor, **options: Any) -> Tensor:
        """The same by its two halves. Raises UnsupportedError if they do without the experts."""
        called: list[Tensor] = []

        def answer(states: Tensor, *others: Tensor) -> Tensor:
            called.append(states)
            return _do_nothing(states, *others)

        with self._stand_in.answering(answer):
            output = self._mlp(self._layer, self.mixer(hidden, **options))
        if not called:
            raise self._not_called()
        return output

    @property
    def dense_parameters(self) -> Mapping[str, Tensor]:
        """The layer's parameters without those of its experts, by name."""
        return dict(self._layer.named_parameters())

    def not_the_layer(self, whole: Sequence[str], halves: Sequence[str]) -> UnsupportedError:
        """The error for halves whose operations are not those of the layer."""
        both = itertools.zip_longest(whole, halves, fillvalue="nothing")
        expected, found = next(pair for pair in both if pair[0] != pair[1])
        return UnsupportedError(
            f"{type(self._layer).__name__} computes {expected}, the halves of it that the layout "
            f"gives {found}",
            hint="mixer and mlp of the layout must together be the layer's own forward: norms, "
            "residuals and multipliers included",
        )

    def run(
        self,
        hidden: list[Tensor],
        offload: ActivationOffload,
        fetch: Fetch,
        report: Callable[[], None],
    ) -> None:
        """The second half: replace `hidden`, the chunks [R, T, C], where they are offloaded."""
        if len(hidden) == 1:
            output = self.at_once(
                offload.fetch(hidden[0]), lambda chunk, at: self._serve([chunk], at, fetch)
            )
            hidden[0] = offload.put(hidden[0], output)
            report()
            return
        chunks = [self.route(offload.fetch(states), offload) for states in hidden]
        self._serve(chunks, offload, fetch)
        for i, states in enumerate(hidden):
            total = chunks[i].total
            chunks[i] = chunks[-1]  # frees the rest of it
            output = self.finish(offload.fetch(states), offload.fetch(total))
            hidden[i] = offload.put(states, output)
            del output  # before the next chunk
            report()

    def at_once(
        self, hidden: Tensor, serve: Callable[[RoutedChunk, ActivationOffload], None]
    ) -> Tensor:
        """Run a chunk [R, T, C] through the whole second half. `serve` adds up what its experts
        say.
        """
        called = False
        here = ActivationOffload(hidden.device, on_host=False)

        def answer(states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
            nonlocal called
            called = True
            chunk = self._routed(states, index, weights, here)
            serve(chunk, here)
            return chunk.total

        with self._stand_in.answering(answer):
            output = self._mlp(self._layer, hidden)
        if not called:
            raise self._not_called()
        return output

    def _serve(
        self, chunks: Sequence[RoutedChunk], offload: ActivationOffload, fetch: Fetch
    ) -> None:
        """Add the output of each wanted expert to the chunks that want it."""
        counts = torch.stack([chunk.starts.diff() for chunk in chunks]).sum(0).tolist()
        wanted = {expert: count for expert, count in enumerate(counts) if count}
        with fetch(wanted) as experts:
            for expert, parameters in experts:
                with self.bound(parameters):
                    for chunk in chunks:
                        begin, end = chunk.starts[expert : expert + 2].tolist()
                        if begin < end:
                            self.add(chunk, begin, end, offload)
                del parameters  # before the next ones are made

    def route(self, hidden: Tensor, offload: ActivationOffload) -> RoutedChunk:
        """Run a chunk [R, T, C] up to the experts, to learn which ones it wants."""
        try:
            self._mlp(self._layer, hidden)
        except _Asked as asked:
            return self._routed(*asked.arguments, offload)
        raise self._not_called()

    def _not_called(self) -> UnsupportedError:
        return UnsupportedError(
            f"{type(self._layer).__name__} did not call its experts",
            hint="the adapter's layout says how the layer splits",
        )

    def _routed(
        self, states: Tensor, index: Tensor, weights: Tensor, offload: ActivationOffload
    ) -> RoutedChunk:
        num_tokens = states.shape[0]
        # As eager code goes through them: expert by expert, first choices before second ones.
        experts, order = index.t().reshape(-1).sort(stable=True)
        bounds = torch.arange(self.num_experts + 1, device=experts.device)
        starts = torch.searchsorted(experts, bounds)
        return RoutedChunk(
            offload.store(states),
            offload.store(order % num_tokens),
            offload.store(weights.t().reshape(-1)[order]),
            starts if starts.is_meta else starts.cpu(),
            offload.zeros_like(states),
        )

    def add(self, chunk: RoutedChunk, begin: int, end: int, offload: ActivationOffload) -> None:
        """Add the bound expert's output for its tokens, which are at `begin` to `end`."""
        device, tokens = offload.device, chunk.tokens[begin:end]
        output = self._family(
            offload.rows(chunk.states, tokens),
            torch.zeros(end - begin, 1, dtype=torch.int64, device=device),
            chunk.weights[begin:end, None].to(device),
        )
        offload.add_rows(chunk.total, tokens, output)

    def finish(self, hidden: Tensor, total: Tensor) -> Tensor:
        """Run a chunk [R, T, C] to the end of the layer, `total` [N, C] being what the experts
        say.
        """
        with self._stand_in.answering(lambda *_: total):
            return self._mlp(self._layer, hidden)

    @contextmanager
    def bound(self, parameters: Sequence[Tensor]) -> Iterator[None]:
        """One expert in place, whatever number it is called by."""
        previous = [self._slots[name] for name in self._names]
        for name, value in zip(self._names, parameters, strict=True):
            if self._products and value.dim() == 2:
                self._slots[name] = _Slice(self._products.weight(value))
            else:
                self._slots[name] = _Slice(value)
        try:
            yield
        finally:
            for name, value in zip(self._names, previous, strict=True):
                self._slots[name] = value


def standard_mixer(layer: Any, hidden: Tensor, **options: Any) -> Tensor:
    """The first half of a layer that norms before attention and adds its output to the stream."""
    output: Tensor = layer.self_attn(hidden_states=layer.input_layernorm(hidden), **options)[0]
    return hidden + output


def standard_mlp(layer: Any, hidden: Tensor) -> Tensor:
    """The second half of a layer that norms before its MLP and adds the output to the stream."""
    output: Tensor | tuple[Tensor, ...] = layer.mlp(layer.post_attention_layernorm(hidden))
    return hidden + (output[0] if isinstance(output, tuple) else output)
