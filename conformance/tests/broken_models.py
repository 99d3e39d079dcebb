"""Ways of opening a model that are wrong in one way each: the Llama adapter is good, the engine,
the store or a budget is not. Each wraps `ollm.load`.
"""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path

import torch
from broken import broken_adapter
from families import Granite, Limited

import ollm
from ollm_adapter_llama import LlamaAdapter
from ollm_core import ReadError
from ollm_core.model.outside_layers import OutsideLayers
from ollm_core.plugins.registry import Registry

_ONLY = {}


def upcast(*args, **options):
    return ollm.load(*args, **{**options, "dtype": "float32"})


def chunk_size_ignored(*args, **options):
    return ollm.load(*args, **{**options, "chunk_size": 128})


def blockwise_grows(*args, **options):
    return ollm.load(*args, **{**options, "attention": "exact"})


def exact_is_blockwise(*args, **options):
    return ollm.load(*args, **{**options, "attention": "blockwise"})


def always_direct(*args, **options):
    return ollm.load(*args, **{**options, "reader": "direct"})


def device_budget_ignored(*args, **options):
    model = ollm.load(*args, **options)
    model.accounts.device.limit = 1 << 40
    return model


def host_budget_ignored(*args, **options):
    model = ollm.load(*args, **options)
    model.accounts.host.limit = 1 << 40
    return model


def budget_understated(*args, **options):
    """The planner forgets the activations."""
    model = ollm.load(*args, **options)
    model.engine._pass_planner._workspace.layer_bytes = lambda *_: 0
    return model


def budget_overstated(*args, **options):
    """The planner counts activations three times."""
    model = ollm.load(*args, **options)
    workspace = model.engine._pass_planner._workspace
    real = workspace.layer_bytes
    workspace.layer_bytes = lambda *shape: 3 * real(*shape)
    return model


def last_chunk_dropped(*args, **options):
    model = ollm.load(*args, **options)
    real = model.engine._run

    def run(store, work, plan):
        logits = real(store, work, plan)
        last = plan.chunks[-1]
        if last.begin and len(last.rows) == 1:
            item = work[last.rows[0]]
            store.truncate(item.sequence, item.start + last.begin)
            zeros = torch.zeros_like(logits[0][-last.num_tokens :])
            logits[last.rows[0]] = torch.cat([logits[0][: -last.num_tokens], zeros])
        return logits

    model.engine._run = run
    return model


def rows_mixed_up(*args, **options):
    model = ollm.load(*args, **options)
    real = model.engine.run
    model.engine.run = lambda store, work: real(store, work)[::-1]
    return model


def _shares(load_options, say):
    """A model whose stores say by `say(runs)` what is shared."""
    model = ollm.load(*load_options[0], **load_options[1])
    real = model.new_cache

    def new_cache(*arguments, **options):
        cache = real(*arguments, **options)
        told = cache.store.shared_runs
        cache.store.shared_runs = lambda *asked: say(told(*asked))
        return cache

    model.new_cache = new_cache
    return model


def first_shared_block_left_out(*args, **options):
    return _shares(
        (args, options),
        lambda runs: [replace(run, first=run.first or 256) for run in runs],
    )


def shared_blocks_read_for_each(*args, **options):
    return _shares((args, options), lambda runs: ())


def padding_is_seen(*args, **options):
    model = ollm.load(*args, **options)
    real = model._pass
    model._pass = lambda batch, cache: real(replace(batch, kept=torch.ones_like(batch.kept)), cache)
    return model


def every_pass_twice(*args, **options):
    model = ollm.load(*args, **options)
    real = model.engine.run

    def run(store, work):
        real(store, work)
        for item in work:
            store.truncate(item.sequence, item.start)
        return real(store, work)

    model.engine.run = run
    return model


def one_pass_for_each_row(*args, **options):
    model = ollm.load(*args, **options)
    real = model.engine.run
    model.engine.run = lambda store, work: [real(store, [item])[0] for item in work]
    return model


def errors_swallowed(*args, **options):
    model = ollm.load(*args, **options)
    real = model.engine.run

    def run(store, work):
        try:
            return real(store, work)
        except ReadError:
            return [torch.zeros(item.num_logits, model.config.vocab_size) for item in work]

    model.engine.run = run
    return model


def never_looks(*args, **options):
    model = ollm.load(*args, **options)
    model.engine._check_files = lambda: None
    return model


def zeros_for_missing_bytes(*args, **options):
    """And nothing looks at the file afterwards."""
    model = never_looks(*args, **options)
    source = model.weights._source
    real = source.read

    def read(tensors, buffer):
        try:
            return real(tensors, buffer)
        except ReadError:
            return source._plan(tensors)[1]

    source.read = read
    return model


def failed_pass_stays(*args, **options):
    """A pass that was broken off leaves its tokens in the layers that it reached."""
    model = ollm.load(*args, **options)

    def run(store, work):
        truncate, store.truncate = store.truncate, lambda *_: None
        found = real(store, work)
        store.truncate = truncate  # not after a failure: nothing later drops the tokens either
        return found

    real, model.engine.run = model.engine.run, run
    return model


def first_model_again(path, **options):
    """A module-level cache of models."""
    if "model" not in _ONLY or _ONLY["model"]._closed:
        _ONLY["model"] = ollm.load(path, **options)
    return _ONLY["model"]


def transformers_replaced(*args, **options):
    """A class of transformers is changed while the model is open."""
    from transformers.models.llama import modeling_llama

    model = ollm.load(*args, **options)
    norm = modeling_llama.LlamaRMSNorm
    real = norm.forward
    norm.forward = lambda self, hidden: real(self, hidden) * 1.5
    close = model.close

    def undo():
        norm.forward = real
        close()

    model.close = undo
    return model


LEFT_ENDS = threading.Event()
"""Set, it ends the threads that were left."""


def thread_left(*args, **options):
    thread = threading.Thread(target=LEFT_ENDS.wait, name="ollm-left", daemon=True)
    thread.start()
    return ollm.load(*args, **options)


def file_left(*args, **options):
    model = ollm.load(*args, **options)
    close = model.close

    def leave():
        close()
        if options.get("kv_dir"):
            Path(options["kv_dir"]).mkdir(exist_ok=True)
            (Path(options["kv_dir"]) / "left.kv").touch()

    model.close = leave
    return model


def first_shard_only(*args, **options):
    """What the other files hold is zeros."""
    model = ollm.load(*args, **options)
    source = model.weights._source
    real = source.read
    first = min(tensor.path for unit in model.weights.units for tensor in unit.tensors)

    def read(tensors, buffer):
        offsets = real(tensors, buffer)
        for tensor, offset in zip(tensors, offsets, strict=True):
            if tensor.path != first:
                buffer[offset : offset + tensor.num_bytes] = bytes(tensor.num_bytes)
        return offsets

    source.read = read
    return model


def current_engine(*args, **options):
    """A module-level variable says which engine runs."""
    model = ollm.load(*args, **options)
    real = model.engine.run

    def run(store, work):
        _ONLY["engine"] = real
        time.sleep(0.002)
        return _ONLY["engine"](store, work)

    model.engine.run = run
    return model


def never_stops(*args, **options):
    model = ollm.load(*args, **options)
    real = model.generate
    model.generate = lambda ids, **rest: real(ids, **{**rest, "eos_token_id": None})
    return model


def shifted_positions(*args, **options):
    """Steps are one position late."""
    model = ollm.load(*args, **options)
    rotary = model.engine._skeleton.rotary
    real = rotary.forward
    rotary.forward = lambda hidden, positions: real(
        hidden, positions + (1 if positions.shape[1] == 1 else 0)
    )
    return model


def lookup_costs_passes(*args, **options):
    """Every draft is checked token by token."""
    model = ollm.load(*args, **options)
    real = model.generate

    def generate(ids, prompt_lookup_num_tokens=None, **rest):
        if prompt_lookup_num_tokens:
            real(ids, **rest)
        return real(ids, **rest)

    model.generate = generate
    return model


def outside_left_out(*args, **options):
    """What a family computes outside its layers."""
    model = ollm.load(*args, **options)
    model.engine._skeleton.outside = OutsideLayers()
    return model


def logits_left_as_they_are(*args, **options):
    model = ollm.load(*args, **options)
    skeleton = model.engine._skeleton
    skeleton.outside = replace(skeleton.outside, after_head=())
    return model


def limits_ignored(path, **options):
    """What the adapter declares unsupported is done all the same."""
    return ollm.load(path, **{**options, "registry": Registry.of(LlamaAdapter())})


def _broken(check, sentence, load):
    return broken_adapter(check, sentence, LlamaAdapter, load=load)


BROKEN_MODELS = [
    broken_adapter("exact.resident", "Rows are not multiplied.", Granite, load=outside_left_out),
    broken_adapter(
        "exact.decode", "Logits are not divided.", Granite, load=logits_left_as_they_are
    ),
    broken_adapter(
        "declaration.unsupported", "What is unsupported is done.", Limited, load=limits_ignored
    ),
    _broken("exact.resident", "Everything is computed in float32.", upcast),
    _broken("exact.chunks", "The chunk size is not the one asked for.", chunk_size_ignored),
    _broken("exact.decode", "Exact attention is block-wise.", exact_is_blockwise),
    _broken("exact.resident", "The last chunk is dropped.", last_chunk_dropped),
    _broken(
        "caches.decode-equals-prefill", "Positions of steps are off by one.", shifted_positions
    ),
    _broken("weights.sharded", "Only the first shard is read.", first_shard_only),
    _broken("isolation.threads", "Threads share which engine runs.", current_engine),
    _broken("exact.streamed", "The reading engine is not the one asked for.", always_direct),
    _broken("drafts.assisted", "Drafts cost more passes than they save.", lookup_costs_passes),
    _broken("batches.ragged", "Sequences of a batch are mixed up.", rows_mixed_up),
    _broken("batches.ragged", "A batch is a pass for each row.", one_pass_for_each_row),
    _broken(
        "batches.shared-prefix",
        "Of what forks share the first block is not seen.",
        first_shared_block_left_out,
    ),
    _broken(
        "batches.shared-prefix",
        "What forks share is read for each of them.",
        shared_blocks_read_for_each,
    ),
    _broken("batches.left-padded", "Padding is seen.", padding_is_seen),
    _broken("weights.read-once", "The weights are read twice.", every_pass_twice),
    _broken("memory.budget", "The device budget is ignored.", device_budget_ignored),
    _broken("memory.host", "The host budget is ignored.", host_budget_ignored),
    _broken("memory.planned", "The plan forgets the activations.", budget_understated),
    _broken("memory.planned", "The plan is far too large.", budget_overstated),
    _broken("memory.flat", "Memory grows with the square of the prompt.", blockwise_grows),
    _broken("memory.freed", "A thread is left.", thread_left),
    _broken("memory.freed", "A file is left.", file_left),
    _broken("isolation.interleaved", "Two models are one.", first_model_again),
    _broken("isolation.transformers", "transformers is changed.", transformers_replaced),
    _broken("failure.read-error", "Errors are swallowed.", errors_swallowed),
    _broken("failure.short-read", "Missing bytes are zeros.", zeros_for_missing_bytes),
    _broken("failure.overwritten", "Nothing looks whether files were changed.", never_looks),
    _broken("failure.cancelled", "A broken-off pass leaves its tokens.", failed_pass_stays),
    _broken("language.stop", "Generation does not stop.", never_stops),
]
