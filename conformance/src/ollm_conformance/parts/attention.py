"""The contract of an attention function."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from transformers import GptOssConfig, LlamaConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention
from transformers.models.llama.modeling_llama import LlamaAttention

from ollm_conformance.checks import UNSUPPORTED, check, does_not_apply
from ollm_conformance.compare import same_bits, same_within
from ollm_conformance.parts.base import PartSuite, refusal
from ollm_conformance.parts.lists import KVShape, ListKVStore
from ollm_conformance.process_memory import every_time, process_memory
from ollm_conformance.seeds import drawn
from ollm_core import UnsupportedError
from ollm_core.testing import Attention, KVView

BLOCK = 16
"""Tokens per block of the store."""
HEAD_DIM = 32
SCALING = HEAD_DIM**-0.5
ERRORS = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
"""Largest difference, as part of the largest expected value."""


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """Rows of new tokens, each after some that are stored already. G KV heads, H query heads."""

    query: Tensor
    """[R, H, T, D]."""
    keys: list[Tensor]
    """[G, S, D] per row, the new ones last."""
    values: list[Tensor]
    starts: tuple[int, ...]
    """Stored tokens per row."""

    @classmethod
    def random(
        cls,
        starts: Sequence[int],
        num_new: int,
        heads: tuple[int, int] = (4, 2),
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> Case:
        """`heads` are H and G. Keys are large enough that it matters which of them is seen."""
        generator = drawn(1000 * seed + 10 * num_new + sum(starts))

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        num_heads, num_kv_heads = heads
        return cls(
            random(len(starts), num_heads, num_new, HEAD_DIM) * 1.5,
            [random(num_kv_heads, start + num_new, HEAD_DIM) for start in starts],
            [random(num_kv_heads, start + num_new, HEAD_DIM) for start in starts],
            tuple(starts),
        )

    def view(self, attention: Attention) -> KVView:
        """What the layer would be given: layer 1 of a store of two, rows in any order."""
        num_kv_heads = self.keys[0].shape[0]
        store = ListKVStore(KVShape(2, num_kv_heads, HEAD_DIM, self.query.dtype, BLOCK))
        sequences = {row: store.new_sequence() for row in reversed(range(len(self.starts)))}
        for row, start in enumerate(self.starts):
            # Behind what is asked for stands more, which must not be seen.
            more = store.shape.random(3, row)
            for layer_idx in range(2):
                keys, values = self.keys[row][:, :start], self.values[row][:, :start]
                if layer_idx == 0:
                    keys, values = values, keys
                store.append(layer_idx, sequences[row], keys, values)
                store.append(layer_idx, sequences[row], more[0], more[1])
        return KVView(
            torch.stack([k[:, start:] for k, start in zip(self.keys, self.starts, strict=True)]),
            torch.stack([v[:, start:] for v, start in zip(self.values, self.starts, strict=True)]),
            1,
            tuple(sequences[row] for row in range(len(self.starts))),
            self.starts,
            store,
            attention,
        )

    def expected(
        self,
        scaling: float = SCALING,
        window: int | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Attention in float64, one query at a time over the keys it may see: [R, T, H, D]."""
        num_rows, num_heads, num_new, _ = self.query.shape
        group = num_heads // self.keys[0].shape[0]
        result = torch.zeros(num_rows, num_new, num_heads, HEAD_DIM, dtype=torch.float64)
        for row in range(num_rows):
            for head in range(num_heads):
                keys = self.keys[row][head // group].double()
                values = self.values[row][head // group].double()
                for i in range(num_new):
                    end = self.starts[row] + i + 1
                    first = 0 if window is None else max(end - window, 0)
                    query = self.query[row, head, i].double()
                    scores = keys[first:end] @ query * scaling
                    if sinks is not None:
                        scores = torch.cat([scores, sinks[head : head + 1].double()])
                    weights = scores.softmax(0)[: end - first]
                    result[row, i, head] = weights @ values[first:end]
        return result


class AttentionConformance(PartSuite):
    """Every check of an attention function. Subclass it as `TestX` and set `attention`."""

    attention: ClassVar[Attention]
    """The function under test."""
    exact: ClassVar[bool] = False
    """Whether it promises the bits of transformers' eager attention."""
    windows: ClassVar[bool] = True
    """Whether it knows the option `sliding_window`."""
    sinks: ClassVar[bool] = True
    """Whether it knows the option `s_aux`."""

    @classmethod
    def attend(
        cls,
        case: Case,
        what: str,
        *,
        scaling: float = SCALING,
        module: nn.Module | None = None,
        **options: Any,
    ) -> Tensor:
        """What the attention function makes of a case, [R, T, H, D]."""
        num_rows, num_heads, num_new, dim = case.query.shape
        attention = cls.attention
        module = module or llama_attention(num_heads, case.keys[0].shape[0])
        with torch.no_grad():
            found = attention(
                module, case.query, case.view(attention), scaling=scaling, dropout=0.0, **options
            )
        shape = [num_rows, num_new, num_heads, dim]
        assert list(found.shape) == shape, f"{what}: expected {shape}, got {list(found.shape)}"
        assert found.dtype == case.query.dtype, (
            f"{what}: expected {case.query.dtype}, got {found.dtype}"
        )
        return found

    @classmethod
    def compare(cls, case: Case, what: str, **options: Any) -> None:
        """Raises AssertionError unless the result is right within the dtype's error."""
        found = cls.attend(case, what, **options)
        expected = case.expected(options.get("scaling", SCALING))
        same_within(found.double(), expected, ERRORS[case.query.dtype], what)

    @check(
        "attention.causal",
        "Each new token sees all stored ones, itself, and no later one, however a prompt is cut.",
        look="the mask: its lower right corner is what stays the same, not its upper left",
    )
    def test_causal(self) -> None:
        for total in (1, 2, 7, 35):
            for start in sorted({0, 1, total // 2, total - 1}):
                if start < total:
                    case = Case.random([start], total - start)
                    self.compare(case, f"{total - start} tokens after {start}")

    @check(
        "attention.blocks",
        "No key is lost or seen twice at the edges of blocks.",
        look="the loop over KVView.past()",
    )
    def test_blocks(self) -> None:
        for start in (0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 5 * BLOCK + 3):
            for num_new in (1, 2, BLOCK + 1):
                self.compare(Case.random([start], num_new), f"{num_new} tokens after {start}")

    @check(
        "attention.heads",
        "Query heads share KV heads in groups of neighbours, of any size.",
        look="which KV head a query head looks at: head // group",
    )
    def test_heads(self) -> None:
        for heads in ((1, 1), (4, 4), (4, 2), (6, 3), (8, 1), (9, 3)):
            for num_new in (1, 5):
                case = Case.random([BLOCK + 3], num_new, heads)
                self.compare(case, f"{heads[0]} query and {heads[1]} KV heads, {num_new} tokens")

    @check(
        "attention.scaling",
        "Scores are multiplied by the scaling that the layer gives, once.",
        look="scaling",
    )
    def test_scaling(self) -> None:
        for scaling in (SCALING, 1.0, 0.03125, 0.5):
            for num_new in (1, 4):
                case = Case.random([BLOCK + 5], num_new)
                self.compare(case, f"scaling {scaling}, {num_new} tokens", scaling=scaling)

    @check(
        "attention.rows",
        "Rows of a batch, which have pasts of different lengths, do not see each other.",
        look="starts and sequences of the KVView, row by row",
    )
    def test_rows(self) -> None:
        for num_new in (1, 3, BLOCK + 2):
            for starts in ((0, 5), (40, 0, 17), (BLOCK, BLOCK, 1, 2 * BLOCK + 1)):
                case = Case.random(starts, num_new)
                self.compare(case, f"{num_new} tokens after {starts}")

    @check(
        "attention.dtypes",
        "In float32, float16 and bfloat16 the error is that of the dtype.",
        look="in which dtype scores, weights and sums are kept",
    )
    @pytest.mark.parametrize("dtype", list(ERRORS), ids=str)
    def test_dtypes(self, dtype: torch.dtype) -> None:
        for start, num_new in ((0, 40), (100, 1), (70, 9), (600, 2)):
            case = Case.random([start], num_new, dtype=dtype)
            self.compare(case, f"{num_new} tokens after {start} in {dtype}")

    @check(
        "attention.large-scores",
        "Scores far from zero give no infinity and no NaN.",
        look="subtract the largest score before exp()",
    )
    def test_large_scores(self) -> None:
        for start, num_new in ((50, 1), (20, 7)):
            case = Case.random([start], num_new)
            self.compare(case, f"{num_new} tokens after {start}", scaling=60.0)

    @check(
        "attention.exact",
        "The result is, bit for bit, that of the family's eager attention over all keys.",
        look="same function, same shapes, same mask as transformers",
    )
    @pytest.mark.parametrize("dtype", list(ERRORS), ids=str)
    def test_exact(self, dtype: torch.dtype) -> None:
        if not self.exact:
            does_not_apply("it promises small errors, not the same bits")
        for start, num_new in ((0, 33), (33, 1), (50, 20), (300, 3)):
            case = Case.random([start], num_new, dtype=dtype)
            module = llama_attention(4, 2)
            found = self.attend(case, "exact", module=module)
            expected = eager(module, case, SCALING)
            same_bits(found, expected, f"{num_new} tokens after {start} in {dtype}")

    @check(
        "attention.pure",
        "Query, keys and values are as they were, and the same call gives the same result.",
        look="operations in place",
    )
    def test_pure(self) -> None:
        case = Case.random([0, 20], 5)
        before = [case.query.clone(), *(t.clone() for t in case.keys + case.values)]
        first = self.attend(case, "once")
        for one, other in zip([case.query, *case.keys, *case.values], before, strict=True):
            same_bits(one, other, "an argument afterwards")
        same_bits(self.attend(case, "twice"), first, "the second time")

    @check(
        "attention.unknown-option",
        "An option that it does not know is refused unless it is None, not ignored.",
        look="options: raise UnsupportedError for the others",
    )
    def test_unknown_option(self) -> None:
        case = Case.random([3], 2)
        options: dict[str, Any] = {"softcap": 50.0, "position_bias": torch.zeros(1), "new": True}
        unset: dict[str, Any] = dict.fromkeys(("softcap", "sliding_window", "s_aux", "new"))
        options |= {} if self.windows else {"sliding_window": 4}
        options |= {} if self.sinks else {"s_aux": torch.zeros(4)}
        same_bits(
            self.attend(case, "None", **unset),
            self.attend(case, "without options"),
            "with options that are None",
        )
        for name, value in options.items():
            refusal(
                UnsupportedError,
                partial(self.attend, case, name, **{name: value}),
                f"{name}={value}",
            )

    @check(
        "attention.windows",
        "With a sliding window each token sees itself and what is before it, that many in all.",
        look="sliding_window: the first key that is seen",
    )
    def test_windows(self) -> None:
        if not self.windows:
            pytest.skip(f"{UNSUPPORTED}the option sliding_window")
        for window in (1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 40, 1000):
            for starts, num_new in (((0,), 37), ((BLOCK,), 1), ((70, 3), 1), ((50, 0), 20)):
                case = Case.random(starts, num_new)
                what = f"window {window}, {num_new} tokens after {starts}"
                found = self.attend(case, what, sliding_window=window)
                expected = case.expected(window=window)
                same_within(found.double(), expected, ERRORS[torch.float32], what)

    @check(
        "attention.sinks",
        "A sink takes its part of each head's weight, with and without a window.",
        look="s_aux [H]: one more score per query head, without a value",
    )
    def test_sinks(self) -> None:
        if not self.sinks:
            pytest.skip(f"{UNSUPPORTED}the option s_aux")
        sinks = torch.tensor([-3.0, 0.5, 2.0, 5.0])
        module = sink_attention(sinks)
        for window in (None, 5) if self.windows else (None,):
            for starts, num_new in (((0,), 9), ((BLOCK + 4,), 1), ((50, 3), 6)):
                case = Case.random(starts, num_new)
                what = f"sinks, window {window}, {num_new} tokens after {starts}"
                found = self.attend(
                    case, what, module=module, s_aux=module.sinks, sliding_window=window
                )
                expected = case.expected(window=window, sinks=sinks)
                same_within(found.double(), expected, ERRORS[torch.float32], what)

    @check(
        "attention.long",
        "After five thousand tokens, in three hundred blocks, all of them are seen, and behind a "
        "window of thousands just those in it.",
        look="numbers of blocks and positions that are kept in one byte, rounded or limited; sums "
        "that many terms are added to one by one",
    )
    def test_long(self) -> None:
        past = 312 * BLOCK + 8
        for window in (None, 4096) if self.windows else (None,):
            for num_new in (1, 2, BLOCK + 1):
                case = Case.random([past], num_new)
                what = f"window {window}, {num_new} tokens after {past}"
                found = self.attend(case, what, sliding_window=window)
                expected = case.expected(window=window)
                same_within(found.double(), expected, ERRORS[torch.float32], what)

    @check(
        "attention.memory",
        "When a call is over, the process holds nothing of it.",
        look="results, masks and joined keys that are kept for the next call: numpy arrays, bytes "
        "and maps count too",
    )
    @every_time
    def test_memory(self) -> None:
        past = 12_000  # 12 MB of keys and values
        cases = [Case.random([past], 1, (4, 4), seed=seed) for seed in range(2)]
        self.attend(cases[0], "the first call")
        with process_memory() as memory:
            for number, case in enumerate(cases):
                what = f"call {number + 1} after {past} tokens"
                self.attend(case, what)
            memory.expect(0, what, "as before the calls")


def llama_attention(num_heads: int, num_kv_heads: int) -> nn.Module:
    """The module that asks: of Llama, whose eager attention is the plain one."""
    config = LlamaConfig(
        hidden_size=num_heads * HEAD_DIM,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=HEAD_DIM,
    )
    with torch.device("meta"):
        return LlamaAttention(config, layer_idx=1).eval()


def sink_attention(sinks: Tensor) -> GptOssAttention:
    """The module of a family with sinks, four query heads and two KV heads."""
    config = GptOssConfig(
        hidden_size=4 * HEAD_DIM,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=HEAD_DIM,
    )
    with torch.device("meta"):
        module = GptOssAttention(config, layer_idx=1).eval()
    module.sinks = nn.Parameter(sinks, requires_grad=False)
    return module


def eager(module: nn.Module, case: Case, scaling: float) -> Tensor:
    """transformers' eager attention over all keys of one row, [1, T, H, D]."""
    modeling = sys.modules[type(module).__module__]
    function: Callable[..., tuple[Tensor, Tensor]] = vars(modeling)["eager_attention_forward"]
    (start,), num_new = case.starts, case.query.shape[2]
    lowest = torch.finfo(case.query.dtype).min
    mask = torch.full((num_new, start + num_new), lowest, dtype=case.query.dtype).triu(start + 1)
    keys, values = (t[0].contiguous()[None] for t in (case.keys, case.values))
    with torch.no_grad():
        return function(module, case.query, keys, values, mask[None, None], scaling=scaling)[0]
