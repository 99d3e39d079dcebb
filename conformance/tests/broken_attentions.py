"""Attention functions with one fault each, on top of a plain one."""

from __future__ import annotations

from typing import ClassVar

import torch
from broken import BrokenPart

from ollm_conformance import AttentionConformance
from ollm_core import UnsupportedError


class PlainAttention:
    """All keys in one piece, in float32; knows windows and sinks."""

    def __call__(self, module, query, view, *, scaling, sliding_window=None, s_aux=None, **options):
        self.check(options)
        rows = [
            self.one_row(query[row].float(), view, row, scaling, sliding_window, s_aux)
            for row in range(query.shape[0])
        ]
        return torch.stack(rows).to(query.dtype)

    def check(self, options):
        for name, value in options.items():
            if value is not None and name != "dropout":
                raise UnsupportedError(f"unknown option {name!r}")

    def one_row(self, query, view, row, scaling, window, sinks):
        keys, values = self.gather(view, row)  # [G, S, D]
        heads = self.heads(query.shape[0], keys.shape[0])
        scores = query @ keys[heads].float().transpose(1, 2) * scaling  # [H, T, S]
        num_new, num_keys = scores.shape[1:]
        queries = torch.arange(num_new)[:, None] + num_keys - num_new
        hidden = self.hidden(queries, torch.arange(num_keys), window)
        scores = scores.masked_fill(hidden, -torch.inf)
        if sinks is not None:
            column = self.sink_scores(sinks, heads)[:, None, None].expand(-1, num_new, 1)
            scores = torch.cat([scores, column], dim=2)
        weights = self.softmax(scores)[:, :, :num_keys]
        return (weights @ values[heads].float()).transpose(0, 1)

    def gather(self, view, row):
        pairs = [*self.past(view, row), (view.keys[row], view.values[row])]
        return tuple(torch.cat(parts, dim=1) for parts in zip(*pairs, strict=True))

    def past(self, view, row):
        return [(keys.clone(), values.clone()) for keys, values in view.past(row)]

    def heads(self, num_heads, num_kv_heads):
        """The KV head of each query head."""
        return torch.arange(num_heads) // (num_heads // num_kv_heads)

    def hidden(self, queries, keys, window):
        """Which positions [T, S] are not seen."""
        unseen = keys > queries
        return unseen if window is None else unseen | (keys <= queries - window)

    def sink_scores(self, sinks, heads):
        return sinks.float()

    def softmax(self, scores):
        return scores.softmax(-1)


def suite_of(attention_, **attributes):
    """The suite for an attention function."""

    class Suite(AttentionConformance):
        attention = attention_()

    for name, value in attributes.items():
        setattr(Suite, name, value)
    return Suite


class TopLeftMask(PlainAttention):
    def hidden(self, queries, keys, window):
        return super().hidden(queries - queries[0], keys, window)


class SeesTheNextToken(PlainAttention):
    def hidden(self, queries, keys, window):
        return super().hidden((queries + 1).clamp(max=int(queries[-1])), keys, window)


class ScalingIgnored(PlainAttention):
    def one_row(self, query, view, row, scaling, window, sinks):
        return super().one_row(query, view, row, query.shape[-1] ** -0.5, window, sinks)


class ScaledTwice(PlainAttention):
    def one_row(self, query, view, row, scaling, window, sinks):
        return super().one_row(query * scaling, view, row, scaling, window, sinks)


class HeadsByModulo(PlainAttention):
    def heads(self, num_heads, num_kv_heads):
        return torch.arange(num_heads) % num_kv_heads


class LastBlockDropped(PlainAttention):
    def past(self, view, row):
        found = super().past(view, row)
        return found[:-1] if len(found) > 1 else found


class FirstKeysDropped(PlainAttention):
    def past(self, view, row):
        return [(keys[:, 1:], values[:, 1:]) for keys, values in super().past(view, row)]


class KeysAndValuesSwapped(PlainAttention):
    def past(self, view, row):
        return [(values, keys) for keys, values in super().past(view, row)]


class RowsMixed(PlainAttention):
    def gather(self, view, row):
        keys, values = super().gather(view, row)
        if row and view.starts[row] == view.starts[0]:
            keys, values = super().gather(view, 0)
        return keys, values


class ThroughBfloat16(PlainAttention):
    def softmax(self, scores):
        return super().softmax(scores).bfloat16().float()


class NoLargestSubtracted(PlainAttention):
    def softmax(self, scores):
        weights = scores.exp()
        return weights / weights.sum(-1, keepdim=True)


class UnknownIgnored(PlainAttention):
    def check(self, options):
        pass


class ScalesInPlace(PlainAttention):
    def __call__(self, module, query, view, *, scaling, **options):
        query.mul_(scaling)
        return super().__call__(module, query, view, scaling=1.0, **options)


class WindowOffByOne(PlainAttention):
    def hidden(self, queries, keys, window):
        return super().hidden(queries, keys, window and window + 1)


class WindowIgnored(PlainAttention):
    def hidden(self, queries, keys, window):
        return super().hidden(queries, keys, None)


class SinksIgnored(PlainAttention):
    def one_row(self, query, view, row, scaling, window, sinks):
        return super().one_row(query, view, row, scaling, window, None)


class SinksByKVHead(PlainAttention):
    def sink_scores(self, sinks, heads):
        return sinks.float()[heads]


class BlockNumbersInAByte(PlainAttention):
    def past(self, view, row):
        found = super().past(view, row)
        return [
            found[number % 256] if len(pair[0][0]) == 16 else pair
            for number, pair in enumerate(found)
        ]


class LastPositionsOnly(PlainAttention):
    def past(self, view, row):
        return super().past(view, row)[-256:]


class PositionsInFloat16(PlainAttention):
    """A window that counts in float16 is right for short texts."""

    def hidden(self, queries, keys, window):
        return super().hidden(queries, keys.half().float(), window)


class KeepsJoinedKeys(PlainAttention):
    def __init__(self):
        self.joined = {}

    def gather(self, view, row):
        found = super().gather(view, row)
        self.joined[view.sequences, view.starts, len(self.joined)] = found
        return found


class KeepsBytes(PlainAttention):
    kept: ClassVar = []

    def gather(self, view, row):
        keys, values = super().gather(view, row)
        if keys.shape[1] > 10_000:
            self.kept.append((keys.numpy().tobytes(), values.numpy().tobytes()))
        return keys, values


BROKEN_ATTENTIONS = [
    BrokenPart(name, fault, suite, f"attention.{check}")
    for name, fault, suite, check in [
        ("top-left-mask", "The mask counts from the first key, not from the last.",
         suite_of(TopLeftMask), "causal"),
        ("sees-the-next", "Each token sees the one after it.",
         suite_of(SeesTheNextToken), "causal"),
        ("scaling-ignored", "Scores are scaled by the head dimension, whatever the layer says.",
         suite_of(ScalingIgnored), "scaling"),
        ("scaled-twice", "Scores are scaled twice.", suite_of(ScaledTwice), "scaling"),
        ("heads-by-modulo", "Query heads take turns at the KV heads.",
         suite_of(HeadsByModulo), "heads"),
        ("last-block-dropped", "The last of several blocks is not seen.",
         suite_of(LastBlockDropped), "blocks"),
        ("first-keys-dropped", "The first key of each block is not seen.",
         suite_of(FirstKeysDropped), "blocks"),
        ("keys-values-swapped", "Stored keys are taken for values.",
         suite_of(KeysAndValuesSwapped), "causal"),
        ("rows-mixed", "Rows with pasts of equal length see the first row's.",
         suite_of(RowsMixed), "rows"),
        ("through-bfloat16", "Weights are rounded to bfloat16.",
         suite_of(ThroughBfloat16), "dtypes"),
        ("overflow", "The largest score is not subtracted.",
         suite_of(NoLargestSubtracted), "large-scores"),
        ("block-number-in-a-byte", "After 256 blocks the first ones are seen again.",
         suite_of(BlockNumbersInAByte), "long"),
        ("last-blocks-only", "The last 256 blocks are seen.", suite_of(LastPositionsOnly), "long"),
        ("positions-in-float16", "Positions are rounded to float16.",
         suite_of(PositionsInFloat16), "long"),
        ("keeps-joined-keys", "Joined keys and values are kept.",
         suite_of(KeepsJoinedKeys), "memory"),
        ("keeps-bytes", "The bytes of keys and values are kept by the class.",
         suite_of(KeepsBytes), "memory"),
        ("not-exact", "Other last bits where the same bits are promised.",
         suite_of(PlainAttention, exact=True), "exact"),
        ("in-place", "The query is scaled in place.", suite_of(ScalesInPlace), "pure"),
        ("unknown-ignored", "Options that it does not know are ignored.",
         suite_of(UnknownIgnored), "unknown-option"),
        ("window-ignored-silently", "A window is ignored where it is not known.",
         suite_of(WindowIgnored, windows=False), "unknown-option"),
        ("window-off-by-one", "Windows see one token more.", suite_of(WindowOffByOne), "windows"),
        ("window-ignored", "Windows are ignored.", suite_of(WindowIgnored), "windows"),
        ("sinks-ignored", "Sinks are ignored.", suite_of(SinksIgnored), "sinks"),
        ("sinks-by-kv-head", "Query heads take the sinks of their KV heads.",
         suite_of(SinksByKVHead), "sinks"),
    ]
]  # fmt: skip

GOOD_ATTENTIONS = [suite_of(PlainAttention)]
