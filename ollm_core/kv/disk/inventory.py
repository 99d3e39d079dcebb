"""What prefix caches in a directory hold, told without a model. Everything there is hostile."""

from __future__ import annotations

import stat
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ollm_core.device.buffers import round_up
from ollm_core.errors import KVStoreError
from ollm_core.files.paths import is_private
from ollm_core.kv.disk.borrowed import contents_of, tokens_of
from ollm_core.kv.disk.directory import PREFIX, is_home, strangers_in
from ollm_core.kv.disk.journal import Prefix, read_journal
from ollm_core.kv.disk.marks import Marks, read_marks
from ollm_core.kv.disk.unfinished import Unfinished, read_unfinished, unfinished_files
from ollm_core.kv.recurrent.snapshots import StoredState, list_states

_MAX_BLOCK_BYTES = 1 << 30
_MAX_LAYERS = 10_000


@dataclass(frozen=True, slots=True)
class StoredPrefix:
    """One kept prefix and what its directory says of the model."""

    directory: Path
    fingerprint: str
    dtype: str
    block_bytes: tuple[int, ...]
    """Of each layer."""
    prefix: Prefix
    last_used: int
    """Seconds since 1970: when it was kept, or last found."""
    pinned: bool
    states: tuple[StoredState, ...] = ()
    """Recurrent states after its tokens, or after their beginning; others may share them."""

    @property
    def id(self) -> str:
        """Hex digits that name the tokens."""
        return self.prefix.key.hex()

    @property
    def num_bytes(self) -> int:
        """On disk, without states. Blocks that several prefixes share are counted in each."""
        sizes = zip(self.prefix.layers, self.block_bytes, strict=True)
        return sum(len(layer.blocks) * round_up(block_bytes) for layer, block_bytes in sizes)


@dataclass(frozen=True, slots=True)
class StoredUnfinished:
    """An unfinished prompt and what its file says of the model."""

    directory: Path
    fingerprint: str
    dtype: str
    block_bytes: tuple[int, ...]
    """Of each layer that keeps keys and values."""
    one: Unfinished

    @property
    def last_used(self) -> int:
        """When it was last written, in seconds since 1970."""
        return self.one.prefix.seconds

    @property
    def num_bytes(self) -> int:
        """On disk."""
        sizes = zip(self.one.prefix.layers, self.block_bytes, strict=False)
        blocks = sum(len(layer.blocks) * round_up(block_bytes) for layer, block_bytes in sizes)
        return blocks + self.one.file_bytes

    @property
    def claimed_bytes(self) -> int:
        """That it takes, and may come to take until its pass is through."""
        return max(self.num_bytes, self.one.claim_bytes)


@dataclass(frozen=True, slots=True)
class Inventory:
    """What a directory holds."""

    prefixes: list[StoredPrefix]
    """Least recently used first."""
    states: list[StoredState]
    """Those that no prefix leads to: it has been removed, or is kept when a run ends."""
    empty: list[Path]
    """Directories of ours that hold no prefix: a process was killed there or is at work, or they
    are damaged.
    """
    remarks: list[str]
    """What is damaged or not ours, one line each."""
    unfinished: list[StoredUnfinished] = field(default_factory=list)
    """Longest ago written first."""

    def num_bytes(
        self, without: Collection[tuple[Path, bytes]] = (), *, claimed: bool = False
    ) -> int:
        """Of all that is kept, but for prefixes and unfinished prompts by directory and key. What
        several prefixes share is counted once. With what unfinished ones may yet take, if
        `claimed`.
        """
        passes = (one for one in self.unfinished if (one.directory, one.one.key) not in without)
        unfinished = sum(one.claimed_bytes if claimed else one.num_bytes for one in passes)
        blocks: dict[tuple[Path, int, int], int] = {}
        states = {state.path: state.num_bytes for state in self.states}
        for one in self.prefixes:
            if (one.directory, one.prefix.key) not in without:
                states |= {state.path: state.num_bytes for state in one.states}
                for layer_idx, block, _ in contents_of([one.prefix]):
                    num_bytes = round_up(one.block_bytes[layer_idx])
                    blocks[one.directory, layer_idx, block] = num_bytes
        return sum(blocks.values()) + sum(states.values()) + unfinished


def take_inventory(parent: Path) -> Inventory:
    """What is kept in `parent`. Nothing is changed; links are not followed."""
    states, remarks = list_states(parent)
    found: list[StoredPrefix] = []
    empty: list[Path] = []
    unfinished: list[StoredUnfinished] = []
    for directory in _homes(parent, remarks):
        here: list[StoredPrefix] = []
        try:
            fields, prefixes, _ = read_journal(directory)
            here = list(_stored(directory, fields, prefixes, states))
            if len(here) < len(prefixes):
                remarks.append(f"{directory}: {len(prefixes) - len(here)} prefixes are damaged")
        except FileNotFoundError:  # of a run that keeps nothing, or is about to begin
            pass
        except OSError as error:
            remarks.append(f"{directory}: {error.strerror}")
        except KVStoreError as error:
            remarks.append(error.message)
        remarks += [f"{path}: not a file of ollm" for path in strangers_in(directory)]
        found += here
        begun = list(_unfinished(directory, remarks))
        unfinished += begun
        if not here and not begun and is_home(directory):
            empty.append(directory)
    led = {state.path for one in found for state in one.states}
    found.sort(key=lambda one: (one.last_used, one.prefix.seconds))
    unfinished.sort(key=lambda one: one.last_used)
    strays = [one for one in states if one.path not in led]
    return Inventory(found, strays, empty, remarks, unfinished)


def _homes(parent: Path, remarks: list[str]) -> Iterator[Path]:
    """Those of this user, and a remark for each that only has a name of ours."""
    with suppress(OSError):
        for path in sorted(parent.glob(f"{PREFIX}*")):
            with suppress(OSError):
                about = path.lstat()
                if is_private(about):
                    yield path
                else:
                    link = "a link" if stat.S_ISLNK(about.st_mode) else "not private to this user"
                    remarks.append(f"{path}: {link}, left alone")


def _stored(
    directory: Path,
    fields: dict[str, Any],
    prefixes: Sequence[Prefix],
    states: Sequence[StoredState],
) -> Iterator[StoredPrefix]:
    fingerprint, dtype = str(fields.get("fingerprint")), str(fields.get("dtype"))
    block_bytes, marks = _block_bytes(fields), read_marks(directory)
    mine = [one for one in states if (one.fingerprint, one.dtype) == (fingerprint, dtype)]
    for prefix in prefixes:
        if len(prefix.layers) == len(block_bytes) and prefix.token_ids:
            leads = tuple(one for one in mine if one.is_of(tokens_of(prefix)))
            yield StoredPrefix(
                directory,
                fingerprint,
                dtype,
                block_bytes,
                prefix,
                _last_used(prefix, marks),
                prefix.key.hex() in marks.pinned,
                leads,
            )


def _unfinished(directory: Path, remarks: list[str]) -> Iterator[StoredUnfinished]:
    for path in unfinished_files(directory):
        try:
            fields, one = read_unfinished(path)
            sizes = _block_bytes(fields)
            if len(one.prefix.layers) > len(sizes):
                raise KVStoreError(f"{path}: the unfinished prompt is damaged")
        except FileNotFoundError:  # it has just been finished
            continue
        except (OSError, KVStoreError) as error:
            remarks.append(str(error.message if isinstance(error, KVStoreError) else error))
            continue
        named = str(fields.get("fingerprint")), str(fields.get("dtype"))
        yield StoredUnfinished(directory, *named, sizes, one)


def _last_used(prefix: Prefix, marks: Marks) -> int:
    return max(prefix.seconds, marks.used.get(prefix.key.hex(), 0))


def _block_bytes(fields: dict[str, Any]) -> tuple[int, ...]:
    """Of each layer; the header has sizes, and for how many layers each holds."""
    found: list[int] = []
    runs = fields.get("block_bytes")
    for run in runs if isinstance(runs, list) else [()]:
        match run:
            case [int(size), int(count)] if 0 < size <= _MAX_BLOCK_BYTES and count <= _MAX_LAYERS:
                found += [size] * count
            case _:
                raise KVStoreError("the header of the KV file is damaged")
    return tuple(found)
