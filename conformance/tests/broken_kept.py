"""KV on disk that is found, or believed, where it must not be. Each wraps `ollm.load`; the adapters
are good.
"""

from __future__ import annotations

import functools
import json
import struct
from dataclasses import replace
from pathlib import Path

import torch
from broken import broken_adapter

import ollm
from ollm_adapter_llama import LlamaAdapter
from ollm_adapter_qwen3_next import Qwen3NextAdapter
from ollm_core.checkpoint.safetensors import open_checkpoint, read_config
from ollm_core.device.buffers import PAGE
from ollm_core.errors import DamagedKVError, KVStoreError
from ollm_core.kv.disk.layer_file import MAGIC, read_header
from ollm_core.kv.disk.prefix_cache import PrefixCachingStore
from ollm_core.model.fingerprint import identity


def with_store(change):
    """A load whose every store of kept keys and values is changed."""

    @functools.wraps(change)
    def load(*args, **options):
        model = ollm.load(*args, **options)
        real = model._open_store

        def open_store(*asked):
            tier, store = real(*asked)
            kept = getattr(store, "_kept", store)
            if isinstance(kept, PrefixCachingStore):
                change(store)
            return tier, store

        model._open_store = open_store
        return model

    return load


def found_by(count):
    """A load whose store says of a kept prompt that the first `count(kept, wanted, common)` tokens
    are those that are wanted; `common` is right.
    """

    @with_store
    @functools.wraps(count)
    def change(store):
        real = store._matches

        def matches(token_ids):
            found = [
                (
                    pin,
                    min(
                        count(pin.token_ids, token_ids, common), len(pin.token_ids), len(token_ids)
                    ),
                )
                for pin, common in real(token_ids)
            ]
            return sorted(found, key=lambda one: one[1], reverse=True)

        store._matches = matches

    return change


@found_by
def ends_of_blocks_compared(kept, wanted, common):
    """A block is named by its first and last token."""
    num_found = 0
    while num_found + 256 <= min(len(kept), len(wanted)):
        first, last = num_found, num_found + 255
        if kept[first] != wanted[first] or kept[last] != wanted[last]:
            break
        num_found += 256
    return max(num_found, common)


@found_by
def last_block_not_compared(kept, wanted, common):
    return -(-common // 256) * 256


@found_by
def found_one_too_many(kept, wanted, common):
    return common + 1


@found_by
def whole_prompts_only(kept, wanted, common):
    return common if common == len(kept) else 0


@found_by
def beginnings_alone_compared(kept, wanted, common):
    """Prompts that share a block are the same document."""
    return common if common < 256 else min(len(kept), len(wanted))


def dtype_not_in_the_key(directory, **options):
    """What is kept in one dtype is taken in another of the same size."""
    dtype = options.get("dtype", "auto")
    kept = Path(options["kv_dir"]) if "kv_dir" in options else None
    for path in kept.rglob("*") if kept and dtype in ("bfloat16", "float16") else ():
        if path.is_file():
            data = path.read_bytes()
            fields = read_header(data[:PAGE], path)
            if fields["dtype"] in ("bfloat16", "float16"):
                page = MAGIC + json.dumps({**fields, "dtype": dtype}).encode()
                path.write_bytes(page.ljust(PAGE, b"\0") + data[PAGE:])
    return ollm.load(directory, **options)


def other_dtypes_removed(directory, **options):
    """A directory is for one dtype: what is there in another is removed."""
    kept = Path(options["kv_dir"]) if "kv_dir" in options else None
    for path in kept.glob("ollm-kv-*/*.kv") if kept and kept.is_dir() else ():
        if read_header(path.read_bytes()[:PAGE], path)["dtype"] != options.get("dtype"):
            path.unlink()
    return ollm.load(directory, **options)


@with_store
def states_of_all_dtypes_in_one_file(store):
    files = store._files
    files.path = lambda ids: (
        type(files)
        .path(files, ids)
        .with_name(type(files).path(files, ids).name.rpartition("-")[0] + ".state")
    )


def read_as(check):
    """A load whose recurrent states on disk are read, and checked by `check(header, fields)`."""

    @with_store
    @functools.wraps(check)
    def change(store):
        files = store._files

        def read(token_ids):
            path = files.path(token_ids)
            data = path.read_bytes()
            try:
                header = read_header(data[:PAGE], path)
            except KVStoreError:
                header = None
            if not check(header, files.fields(token_ids)):
                path.unlink()
                return None
            data = bytearray(data[PAGE:].ljust(files._num_bytes, b"\0"))
            states = {}
            for layer_idx, begin in files.offsets.items():
                states[layer_idx] = []
                for shape, dtype in files._geometry.state_shapes(layer_idx):
                    size = torch.Size(shape).numel()
                    value = torch.frombuffer(data, dtype=dtype, count=size, offset=begin)
                    states[layer_idx].append(value.clone().view(shape))
                    begin += size * dtype.itemsize
            return states

        files.read = read

    return change


@read_as
def states_not_checked(header, fields):
    return True


@read_as
def checksum_of_states_ignored(header, fields):
    return header is not None and all(header.get(key) == value for key, value in fields.items())


@with_store
def tokens_of_states_ignored(store):
    """A file of states is checked, and not for which tokens it is."""
    files = store._files
    real_fields, real_read = files.fields, files.read

    def read(token_ids):
        said = read_header(files.path(token_ids).read_bytes()[:PAGE], files.path(token_ids))
        files.fields = lambda ids: {**real_fields(ids), "tokens": said["tokens"]}
        try:
            return real_read(token_ids)
        finally:
            files.fields = real_fields

    files.read = read


@with_store
def blocks_not_checked(store):
    disk = getattr(store, "_kept", store)._disk
    real = disk._read_slots

    def read_slots(layer_idx, slots, buffer):
        known, disk.checksums = disk.checksums, {}
        try:
            real(layer_idx, slots, buffer)
        finally:
            disk.checksums = known

    disk._read_slots = read_slots


@with_store
def first_block_checked_only(store):
    disk = getattr(store, "_kept", store)._disk
    real = disk._read_slots

    def read_slots(layer_idx, slots, buffer):
        try:
            real(layer_idx, slots, buffer)
        except DamagedKVError:
            if (layer_idx, 0) in disk.damaged:
                raise
            disk.damaged.clear()

    disk._read_slots = read_slots


def index_read_without_care(*args, **options):
    """An index that ends too early is a raw error."""
    model = ollm.load(*args, **options)
    real = model._open_store

    def open_store(kv, directory, *asked):
        for path in directory.glob("*/prefixes.journal") if directory else ():
            data, offset = path.read_bytes(), PAGE
            while offset < len(data):
                _, _, length, _ = struct.unpack_from("<4sIQQ", data, offset)
                offset += struct.calcsize("<4sIQQ")
                struct.unpack_from(f"<{length}s", data, offset)
                offset += length
        return real(kv, directory, *asked)

    model._open_store = open_store
    return model


@with_store
def damage_is_told_at_length(store):
    """An error of several lines."""
    disk = store._disk
    real = disk._read_slots

    def read_slots(layer_idx, slots, buffer):
        try:
            real(layer_idx, slots, buffer)
        except DamagedKVError as error:
            raise KVStoreError(f"{error}\nremove it\nand run again") from error

    disk._read_slots = read_slots


def attention_not_in_the_key(directory, **options):
    """What a block-wise run has kept is found by an exact one."""
    model = ollm.load(directory, **options)
    checkpoint = open_checkpoint(directory)
    name = functools.partial(identity, checkpoint, read_config(directory))
    model._open_store._request = replace(model._open_store._request, fingerprint=name)
    return model


def _llama(check, sentence, load):
    return broken_adapter(check, sentence, LlamaAdapter, load=load)


def _recurrent(check, sentence, load):
    return broken_adapter(check, sentence, Qwen3NextAdapter, load=load)


BROKEN_KEPT = [
    _llama("caches.other-prompt", "Of a block its ends are compared.", ends_of_blocks_compared),
    _llama("caches.other-prompt", "The last block is not compared.", last_block_not_compared),
    _llama("caches.other-prompt", "A token too many is found.", found_one_too_many),
    _llama("caches.other-prompt", "Only whole kept prompts are found.", whole_prompts_only),
    _llama("caches.other-prompt", "After a block nothing is compared.", beginnings_alone_compared),
    _llama("caches.other-dtype", "The dtype is not in the key.", dtype_not_in_the_key),
    _llama("caches.other-dtype", "Other dtypes are removed.", other_dtypes_removed),
    _recurrent(
        "caches.other-dtype", "Dtypes share files of states.", states_of_all_dtypes_in_one_file
    ),
    _llama("caches.other-attention", "The attention is not in the key.", attention_not_in_the_key),
    _recurrent("caches.damaged", "States are not checked.", states_not_checked),
    _recurrent("caches.damaged", "States have no checksum.", checksum_of_states_ignored),
    _recurrent("caches.damaged", "States of other tokens are taken.", tokens_of_states_ignored),
    _llama("caches.damaged", "Blocks are not checked.", blocks_not_checked),
    _llama("caches.damaged", "Only first blocks are checked.", first_block_checked_only),
    _llama("caches.damaged", "The index is read without care.", index_read_without_care),
    _llama("caches.damaged", "Damage is told in several lines.", damage_is_told_at_length),
]
