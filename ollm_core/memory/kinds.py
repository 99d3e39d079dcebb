"""Kinds of held memory: the name in accounts and JSON, the label for people, and the colour."""

from __future__ import annotations

from enum import StrEnum

OTHER_COLOUR = "#bdbdbd"
"""Of what has no colour of its own: a plugin's kinds, and those that no plan shows."""


class MemoryKind(StrEnum):
    """A kind of held memory. It is a string, its name; plugins may reserve under their own.

    The order is that of stacking in pictures: weights blue, KV green, what a pass takes for itself
    in warm colours.
    """

    label: str
    """For people."""
    colour: str
    """As #rrggbb."""

    def __new__(cls, name: str, label: str = "", colour: str = OTHER_COLOUR) -> MemoryKind:
        kind = str.__new__(cls, name)
        kind._value_ = name
        kind.label = label or name
        kind.colour = colour
        return kind

    __repr__ = str.__repr__  # an account in a message shows names

    WEIGHTS = "weights", "norm, rotary and buffers of one layer", "#9ecae1"
    RESIDENT_WEIGHTS = "resident weights", "resident weights", "#3182bd"
    WEIGHT_RING = "weight ring", "weight prefetch buffers", "#6baed6"
    WEIGHT_STAGING = "weight staging", "weight load buffers", "#4292c6"
    UPLOAD_BUFFERS = "upload buffers", "weight upload buffers", "#deebf7"
    RESIDENT_EXPERTS = "resident experts", "resident experts", "#08519c"
    EXPERT_BUFFERS = "expert buffers", "expert read buffers", "#c6dbef"
    KV_BLOCKS = "kv blocks", "KV blocks", "#31a354"
    KV_UPLOAD = "kv upload", "KV upload buffers", "#a1d99b"
    KV_WRITE_BUFFERS = "kv write buffers", "KV write buffers", "#74c476"
    KV_STAGING = "kv staging", "KV read buffers", "#c7e9c0"
    KV_TAILS = "kv tails", "KV partial blocks", "#006d2c"
    RECURRENT_STATES = "recurrent states", "recurrent states", "#41ab5d"
    LAYER = "layer", "layer activations", "#fd8d3c"
    EXPERT_WORK = "experts' work", "expert activations", "#e6550d"
    LOGITS = "logits", "logits", "#756bb1"
    ROUTED_TOKENS = "routed tokens", "routed tokens", "#fdd0a2"
    HIDDEN_STATES = "hidden states", "hidden states", "#fdae6b"
    POSITIONS = "positions", "positions", "#d9d9d9"
    ACTIVATIONS = "activations"
    """All of a pass, in an account: there a plan's parts from LAYER to POSITIONS are one."""
    LOSS = "loss"
    DRAFT_MODEL = "draft model"


_KNOWN = {kind.value: kind for kind in MemoryKind}


def known_kind(name: str) -> MemoryKind | None:
    """The kind of that name; None for a plugin's own."""
    return _KNOWN.get(name)


def label_of(name: str) -> str:
    """What people are told of a kind; a plugin's own is its name."""
    kind = known_kind(name)
    return kind.label if kind else name


def colour_of(name: str) -> str:
    """The colour of a kind in pictures."""
    kind = known_kind(name)
    return kind.colour if kind else OTHER_COLOUR
