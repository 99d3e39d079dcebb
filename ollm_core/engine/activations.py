"""How much memory one chunk takes on its way through a layer: traced on the meta device, so exact
and quick.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace

from ollm_core.attention.blockwise import most_blocks
from ollm_core.contracts.kv import KVGeometry
from ollm_core.device.buffers import round_up
from ollm_core.engine.batch import Steps
from ollm_core.engine.layer_trace import LayerTrace, TracedCall
from ollm_core.engine.row_sharing import RowSharing
from ollm_core.engine.traced_cache import APART, Sharing
from ollm_core.model.skeleton import Skeleton
from ollm_core.model.spec import ModelSpec

_SAID_BYTES = 12  # a number that stands for keys, and a window
_MOST_PACKED = 64  # shapes of packed calls that are remembered: hardly one comes again


class Workspace:
    """Answers "how many bytes" for the layers of one model. Results are remembered by shape."""

    def __init__(self, skeleton: Skeleton, geometry: KVGeometry) -> None:
        self._skeleton = skeleton
        self._geometry = geometry
        self._layers = LayerTrace(skeleton, geometry)
        self.rows = RowSharing(skeleton, geometry)
        """How rows of a call share what is stored."""
        self._known: dict[TracedCall, int] = {}
        self._known_packed: dict[TracedCall, int] = {}
        self._known_mixtures: dict[tuple[int, int, bool], tuple[int, int, int]] = {}
        # One layer of each kind: what it remembers, and what it is made of.
        kinds: dict[Hashable, list[int]] = {}
        shared = () if skeleton.own is None else skeleton.own.facts.shared
        for layer_idx, (layer, cache) in enumerate(
            zip(skeleton.layers, geometry.kinds, strict=True)
        ):
            made_of = tuple((name, value.shape) for name, value in layer.named_parameters())
            mixture = skeleton.mixtures.get(layer_idx) or skeleton.routed.get(layer_idx)
            experts = mixture and mixture.slice_shapes
            found = sum(one.layer_idx < layer_idx for one in shared)  # of what others hand on
            kinds.setdefault((cache, type(layer), made_of, experts, found), []).append(layer_idx)
        self._alike: Mapping[int, Sequence[int]] = {one[0]: one for one in kinds.values()}
        """By the first of each kind, the layers that take as much."""
        self._bends = {kind.window - 1 for kind in geometry.kinds if kind.window is not None}
        self._grows = skeleton.grows
        """Whether something beside block-wise attention is as long as the past."""

    @classmethod
    def of(cls, spec: ModelSpec, proven: set[str] | None = None) -> Workspace:
        """That of a model whose halves of a layer are the layer; raises UnsupportedError for any
        other. `proven` names the models of which this is known, and remembers this one.
        """
        workspace = cls(spec.skeleton, spec.geometry)
        stated = f"{spec.adapter.name} {spec.config!r}"
        if proven is None or stated not in proven:
            workspace._layers.check_halves(workspace._alike)
            if proven is not None:
                proven.add(stated)
        return workspace

    @property
    def hidden_size(self) -> int:
        """Numbers in the hidden state of one token."""
        return self._skeleton.hidden_size

    @property
    def hidden_itemsize(self) -> int:
        """Bytes of one of these numbers, between layers."""
        if self._skeleton.own is None:
            return self._geometry.dtype.itemsize
        return max(one.itemsize for one in self._skeleton.own.facts.hidden_dtypes)

    @property
    def aligned(self) -> bool:
        """Whether rows of one call must come after equally many tokens."""
        return self._skeleton.own is not None

    @property
    def call_bytes(self) -> int:
        """What each chunk's call holds all the time, to say of layers how long their past is."""
        return 0 if self._skeleton.own is None else _SAID_BYTES * self._geometry.num_layers

    @property
    def steps(self) -> Steps:
        """Which tokens may share a call."""
        own = self._skeleton.own
        if own is None or not any(one.kind.states for one in own.facts.memories):
            return "together"  # layers declared recurrent see to it themselves
        return "drafted" if own.facts.continues else "all"

    def leaving_bytes(
        self, num_rows: int, num_new: int, num_past: int, num_logits: int, attention: str
    ) -> int:
        """Peak bytes of making `num_logits` logits of each row of what the last layer gives, where
        that is left to the model's own forward; else 0.
        """
        if self._skeleton.own is None:
            return 0
        past = round_up(num_past, self._geometry.block_size)
        if attention != "exact" and not self._grows:
            past = min(past, self._geometry.block_size)
        return self._remembered(TracedCall(-1 - num_logits, num_rows, num_new, past, attention))

    def handed_bytes(self, num_rows: int, num_new: int, num_past: int, attention: str) -> int:
        """What layers hand to the next one beside hidden states, for `num_new` tokens in each of
        `num_rows` after `num_past`.
        """
        like = self._layers.handed(num_rows, num_new, num_past, attention)
        return sum(one.nbytes for one in like)

    def shared_bytes(self, num_tokens: int) -> int:
        """What layers keep of `num_tokens` for later ones that share their keys and values."""
        own = self._skeleton.own
        numbers = 0 if own is None else own.facts.shared_numbers
        return num_tokens * numbers * self._geometry.dtype.itemsize

    @property
    def vocab_size(self) -> int:
        """Logits of one token."""
        return int(self._skeleton.config.vocab_size)

    def product_bytes(self, num_logits: int) -> int:
        """What products of so many states with the head take, its output not counted."""
        products = self._skeleton.products if self._skeleton.own is None else None
        return products.scratch_bytes(num_logits, self.hidden_size) if products else 0

    def layer_bytes(
        self,
        num_rows: int,
        num_new: int,
        num_past: int,
        attention: str,
        sharing: Sharing = APART,
        spare: Sequence[int] = (),
    ) -> int:
        """Peak bytes of a layer for `num_new` tokens in each of `num_rows`, after `num_past`
        tokens: of the layer that takes most.

        The layer's output is counted, its input and its weights are not; nor are, by layer, the
        `spare` bytes that are there for larger weights than its own.
        """
        shape = num_rows, num_new, num_past, attention, sharing
        return max(
            max(
                self._one_layer(TracedCall(one, *shape))
                - min((spare[i] for i in alike if spare), default=0),
                0,
            )
            for one, alike in self._alike.items()
        )

    def _one_layer(self, call: TracedCall) -> int:
        layer_idx, _, num_new, num_past, attention, sharing = call
        block_size, window = self._geometry.block_size, self._geometry.kinds[layer_idx].window
        if self._skeleton.own is not None and attention == "exact":
            window = None  # masks of all layers are made together
        if layer_idx in self._skeleton.recurrent:
            return self._remembered(call._replace(num_past=min(num_past, 1), sharing=APART))
        below, above = num_past // block_size * block_size, round_up(num_past, block_size)
        if window is not None and not self._grows:
            # As many as are ever seen: their first block is then as long as any that is cut.
            apart = Sharing(lengths=sharing.lengths)
            return self._remembered(call._replace(num_past=min(above, window - 1), sharing=apart))
        if attention != "exact" and not self._grows:
            most = most_blocks(min(sharing.lengths, default=num_new)) * block_size
            if sharing.runs:
                above = sharing.num_own
                sharing = replace(sharing, num_own=0)
            return self._remembered(call._replace(num_past=min(above, most), sharing=sharing))
        # What an operation takes is a line in num_past. The peak is the highest of such lines, so
        # between two lengths it lies on or below the straight line from one peak to the other.
        # The lines have a bend where a window begins to slide.
        below = max([below, *(bend for bend in self._bends if bend <= num_past)])
        above = min([above, *(bend for bend in self._bends if bend >= num_past)])
        least = self._remembered(call._replace(num_past=below, sharing=APART))
        most = self._remembered(call._replace(num_past=above, sharing=APART))
        return least + -(-(most - least) * (num_past - below) // max(above - below, 1))

    def _remembered(self, call: TracedCall) -> int:
        known = self._known_packed if call.sharing.lengths else self._known
        if call not in known:
            if known is self._known_packed and len(known) == _MOST_PACKED:
                known.clear()
            known[call] = self._layers.peak(call)
        return known[call]

    def mixture_bytes(self, num_tokens: int, num_chunks: int, largest: int) -> tuple[int, int]:
        """What the MLP of a layer with routed experts takes for `num_tokens` in `num_chunks` of at
        most `largest`: peak bytes while it works on one, and bytes offloaded for all of them.

        Hidden states and weights are not counted; any expert may get all tokens of a chunk.
        """
        found = [(0, 0)]
        for layer_idx in self._alike:
            if mixture := self._skeleton.mixtures.get(layer_idx):
                key = layer_idx, largest, num_chunks == 1
                if key not in self._known_mixtures:
                    self._known_mixtures[key] = self._layers.mixture(mixture, *key[1:])
                work, per_token, per_chunk = self._known_mixtures[key]
                found.append((work, per_token * num_tokens + per_chunk * num_chunks))
        return max(work for work, _ in found), max(offloaded for _, offloaded in found)
