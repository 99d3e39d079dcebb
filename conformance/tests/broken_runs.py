"""Runs that go wrong in one way each: what a failure, a cut or a release leaves behind. Each wraps
`ollm.load`; the adapters are good.
"""

from __future__ import annotations

import functools
from contextlib import ExitStack

from broken import broken_adapter
from broken_caches import with_cache

import ollm
from ollm_adapter_llama import LlamaAdapter
from ollm_adapter_qwen3_next import Qwen3NextAdapter
from ollm_core import ReadError


def undone_by(undo):
    """A load whose passes are undone by `undo(work, truncate, sequence, num_tokens)`, where a
    pass fails.
    """

    @functools.wraps(undo)
    def load(*args, **options):
        model = ollm.load(*args, **options)
        real = model.engine.run

        def run(store, work):
            truncate = store.truncate
            store.truncate = lambda sequence, n: undo(work, truncate, sequence, n)
            try:
                return real(store, work)
            finally:
                store.truncate = truncate

        model.engine.run = run
        return model

    return load


@undone_by
def first_row_undone(work, truncate, sequence, num_tokens):
    if sequence == work[0].sequence:
        truncate(sequence, num_tokens)


@undone_by
def last_row_undone(work, truncate, sequence, num_tokens):
    if sequence == work[-1].sequence:
        truncate(sequence, num_tokens)


@undone_by
def undone_by_one_too_many(work, truncate, sequence, num_tokens):
    truncate(sequence, max(num_tokens - 1, 0))


@undone_by
def prompts_undone_only(work, truncate, sequence, num_tokens):
    """Rows that brought one token are taken for finished."""
    if any(item.sequence == sequence and len(item.token_ids) > 1 for item in work):
        truncate(sequence, num_tokens)


@undone_by
def emptied_by_a_failure(work, truncate, sequence, num_tokens):
    truncate(sequence, 0)


@with_cache
def last_layer_not_undone(cache):
    real, last = cache.store._manager.cut, len(cache) - 1

    def cut(layer_idx, table, num_tokens):
        if layer_idx < last:
            real(layer_idx, table, num_tokens)

    cache.store._manager.cut = cut


def noted_too_early(*args, **options):
    """A batch counts as stored before its pass is finished."""
    model = ollm.load(*args, **options)
    real = model._pass

    def run(batch, cache):
        try:
            return real(batch, cache)
        except BaseException:
            cache.extend(batch.kept, batch.tokens)
            raise

    model._pass = run
    return model


def read_errors_not_undone(*args, **options):
    """Only Ctrl-C is."""
    model = ollm.load(*args, **options)
    real = model.engine.run

    def run(store, work):
        truncate, undo = store.truncate, ExitStack()
        store.truncate = lambda *cut: undo.callback(truncate, *cut)
        try:
            return real(store, work)
        except KeyboardInterrupt:
            undo.close()
            raise
        finally:
            store.truncate = truncate

    model.engine.run = run
    return model


def rows_lost_by_a_read_error(*args, **options):
    """All but the first are emptied, to be computed again."""
    model = ollm.load(*args, **options)
    real = model.engine.run

    def run(store, work):
        try:
            return real(store, work)
        except ReadError:
            for item in work[1:]:
                store.truncate(item.sequence, 0)
            raise

    model.engine.run = run
    return model


@with_cache
def crop_forgets_padding(cache):
    """Every row keeps as many tokens as columns are kept."""

    def crop(num_columns):
        wanted = max(cache.get_seq_length() + num_columns, 0)
        for row, sequence in enumerate(cache.rows):
            cache.store.truncate(sequence, min(wanted, cache.num_tokens(row)))
        cache.kept = [kept[:wanted] for kept in cache.kept]

    cache.crop = crop


@with_cache
def first_row_cropped(cache):
    def crop(num_columns):
        wanted = max(cache.get_seq_length() + num_columns, 0)
        cache.store.truncate(cache.rows[0], int(cache.kept[0][:wanted].sum()))
        cache.kept[0] = cache.kept[0][:wanted]

    cache.crop = crop


@with_cache
def crop_past_the_start(cache):
    """Of more columns than there are, the difference is kept from the end."""
    real = cache.crop

    def crop(num_columns):
        length = cache.get_seq_length()
        real(num_columns if length + num_columns >= 0 else length + num_columns)

    cache.crop = crop


@with_cache
def padding_cropped_last(cache):
    """Rows lose their own last tokens, and one for each column that was padding."""
    real = cache.crop

    def crop(num_columns):
        padding = [int((~kept).sum()) for kept in cache.kept]
        real(num_columns)
        for sequence, number in zip(cache.rows, padding, strict=True):
            if cache.store.num_tokens(sequence):
                cache.store.truncate(sequence, cache.store.num_tokens(sequence) - (number > 0))

    cache.crop = crop


@with_cache
def release_leaks(cache):
    cache.store.release = lambda sequence: None


@with_cache
def reset_leaks(cache):
    def reset():
        cache.rows.clear()
        cache.kept = []

    cache.reset = reset


@with_cache
def tails_shared_by_forks(cache):
    """A fork gets a block of its own, but not its content."""
    manager = cache.store._manager
    real = manager._copy_block

    def copy_block(layer_idx, block, held=None):
        new, tail = real(layer_idx, block, held)
        return new, tail if held is None else held

    manager._copy_block = copy_block


@with_cache
def reorder_shares_rows(cache):
    """Rows with one source become one sequence."""

    def pick(sources):
        forks = {source: cache.store.fork(cache.rows[source]) for source in {*sources}}
        for sequence in cache.rows:
            cache.store.release(sequence)
        cache.rows = [forks[source] for source in sources]
        cache.kept = [cache.kept[source] for source in sources]

    cache._pick = pick


@with_cache
def refused_copies_leak(cache):
    def pick(sources):
        forks = [cache.store.fork(cache.rows[source]) for source in sources]
        for sequence in cache.rows:
            cache.store.release(sequence)
        cache.rows = forks
        cache.kept = [cache.kept[source] for source in sources]

    cache._pick = pick


@with_cache
def released_twice_frees_others(cache):
    """Shared blocks lose an owner at each call."""
    store, released = cache.store, {}
    real = store.release

    def release(sequence):
        for layer_idx, table in enumerate(released.get(sequence, ())):
            store._manager.disown(layer_idx, [table.blocks[0]])
        released[sequence] = store._tables.get(sequence, ())
        real(sequence)

    store.release = release


@with_cache
def origin_frees_what_forks_have(cache):
    """Blocks are owned by the sequence that wrote them."""
    store = cache.store
    real = store.release

    def release(sequence):
        for layer_idx, table in enumerate(store._tables.get(sequence, ())):
            for block in table.blocks.values():
                store._manager._num_sharers.pop((layer_idx, block), None)
        real(sequence)

    store.release = release


@with_cache
def states_of_forks_not_paid_for(cache):
    """Forks of recurrent states are counted when they go, not when they come."""
    states = cache.store._states
    real = states.fork

    def fork(sequence, forked, num_tokens):
        real(sequence, forked, num_tokens)
        states._charges.give("recurrent states", states._set_bytes)

    states.fork = fork


def _llama(check, sentence, load):
    return broken_adapter(check, sentence, LlamaAdapter, load=load)


BROKEN_RUNS = [
    _llama("failure.batch-cancelled", "Only the first row is undone.", first_row_undone),
    _llama("failure.batch-cancelled", "Only the last row is undone.", last_row_undone),
    _llama("failure.batch-cancelled", "One token too many is undone.", undone_by_one_too_many),
    _llama("failure.batch-cancelled", "Rows of one token are not undone.", prompts_undone_only),
    _llama("failure.batch-cancelled", "Ctrl-C empties every row.", emptied_by_a_failure),
    _llama("failure.batch-cancelled", "The last layer is not undone.", last_layer_not_undone),
    _llama("failure.batch-cancelled", "A batch is noted before its pass.", noted_too_early),
    _llama("failure.batch-read-error", "Read errors are not undone.", read_errors_not_undone),
    _llama("failure.batch-read-error", "A read error empties rows.", rows_lost_by_a_read_error),
    _llama("batches.crop", "Padding counts as tokens that are kept.", crop_forgets_padding),
    _llama("batches.crop", "Only the first row is cut.", first_row_cropped),
    _llama("batches.crop", "A cut of too many leaves some.", crop_past_the_start),
    _llama("batches.crop", "Padded rows lose a token more.", padding_cropped_last),
    _llama("caches.released", "Released sequences keep their memory.", release_leaks),
    _llama("caches.released", "A reset keeps its memory.", reset_leaks),
    _llama("caches.released", "Forks share an unfinished block.", tails_shared_by_forks),
    _llama("caches.released", "Rows of one source are one sequence.", reorder_shares_rows),
    _llama("caches.released", "Refused copies keep their memory.", refused_copies_leak),
    _llama(
        "caches.released", "A second release takes blocks from others.", released_twice_frees_others
    ),
    _llama(
        "caches.released",
        "An origin takes its blocks from its forks.",
        origin_frees_what_forks_have,
    ),
    broken_adapter(
        "caches.released",
        "States of forks are given back twice.",
        Qwen3NextAdapter,
        load=states_of_forks_not_paid_for,
    ),
]
