"""Every part that is broken on purpose, and the good ones they are made from."""

from __future__ import annotations

from broken_attentions import BROKEN_ATTENTIONS, GOOD_ATTENTIONS
from broken_codec_rows import BROKEN_CODEC_ROWS
from broken_codecs import BROKEN_CODECS
from broken_drafters import BROKEN_DRAFTERS, GOOD_DRAFTERS
from broken_kv_large import BROKEN_KV_LARGE
from broken_kv_stores import BROKEN_KV_STORES, GOOD_KV_STORES
from broken_sources import BROKEN_SOURCES, GOOD_SOURCES
from broken_streamers import BROKEN_STREAMERS, GOOD_STREAMERS
from turned_codec import GOOD_CODECS

BROKEN_PARTS = [
    *BROKEN_KV_STORES,
    *BROKEN_KV_LARGE,
    *BROKEN_SOURCES,
    *BROKEN_STREAMERS,
    *BROKEN_ATTENTIONS,
    *BROKEN_CODECS,
    *BROKEN_CODEC_ROWS,
    *BROKEN_DRAFTERS,
]
GOOD_PARTS = [
    *GOOD_KV_STORES,
    *GOOD_SOURCES,
    *GOOD_STREAMERS,
    *GOOD_ATTENTIONS,
    *GOOD_CODECS,
    *GOOD_DRAFTERS,
]
