"""Faults that an outsider might make: adapters of other models, caches of rows, what a checkpoint's
generation config says, what fails among others. For tests only.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from types import MappingProxyType

import torch
from broken import unseen
from broken_kv_stores import suite_of
from families import Gemma2, Qwen3, Qwen3Moe
from unseen_d import core, part

from ollm_adapter_llama import LlamaAdapter
from ollm_core.generate.cache import SequenceCache
from ollm_core.generate.padding import PaddedBatch
from ollm_core.kv.in_memory import DeviceKVStore
from ollm_core.serving import sampler
from ollm_core.serving.scheduler import Scheduler


# Hurts: a download that lacks its last file, as most of a model does with its head.
class MissingHeadIsTied(LlamaAdapter):
    def weights(self, config, tensor_names):
        names = frozenset(tensor_names)
        tied = config.get("tie_word_embeddings") or "lm_head.weight" not in names
        return super().weights({**config, "tie_word_embeddings": tied}, names)


# Hurts: a Llama whose context was lengthened by YaRN.
class NoYarn(LlamaAdapter):
    rope_types = ("default", "linear", "llama3")


# Hurts: a second model in the process that has biases.
class NamesRemembered(LlamaAdapter):
    seen: dict = {}  # noqa: RUF012

    def layer_parameters(self, config, layer_idx):
        key = config["hidden_size"], config["num_hidden_layers"], layer_idx
        if key not in self.seen:
            self.seen[key] = tuple(super().layer_parameters(config, layer_idx))
        return self.seen[key]


# Hurts: a Qwen3 whose first layers see all.
class WindowsBeginLater(Qwen3):
    def layer_types(self, config):
        first = config.get("max_window_layers")
        if config.get("layer_types") is None and first:
            config = {**config, "max_window_layers": first + 1}
        return super().layer_types(config)


# Hurts: a Gemma that was trained further with a head of its own.
class AlwaysTied(Gemma2):
    def text_config(self, config):
        return {**super().text_config(config), "tie_word_embeddings": True}


# Hurts: a mixture whose config.json does not say how many experts it has.
class EightExpertsByDefault(Qwen3Moe):
    defaults = MappingProxyType({**Qwen3Moe.defaults, "num_experts": 8})


# Hurts: who plans memory for a long answer beside other programs.
class GrowthIsRoundedDown(DeviceKVStore):
    def __init__(self, geometry, account):
        super().__init__(geometry, account)
        growth = self._storage.growth

        def smaller(num_blocks, tails):
            return growth({layer: max(n - 1, 0) for layer, n in num_blocks.items()}, tails)

        self._storage.growth = smaller


# Hurts: a server that forks one long prompt for many answers, until memory is short.
class ChargesStay(DeviceKVStore):
    def __init__(self, geometry, account):
        super().__init__(geometry, account)
        give = self._storage._charges.give

        def give_less(kind, num_bytes):
            give(kind, min(num_bytes, 1 << 16))

        self._storage._charges.give = give_less


# Hurts: a batch of prompts of other lengths, whose KV is kept on disk.
def kept_where_padding_was(self, kept, token_ids):
    before, self.kept = self.kept, [torch.cat(p) for p in zip(self.kept, kept, strict=True)]
    if self._prefixes is not None:
        for sequence, row, ids in zip(self.rows, before, token_ids, strict=True):
            self._prefixes.keep(sequence, len(row), ids)


# Hurts: two prompts of one length, of which the second was asked before.
def restores_by_length(self, prompts, restore=SequenceCache.restore):
    by_length = {}
    restore(self, [by_length.setdefault(len(prompt), prompt) for prompt in prompts])


# Hurts: a search that drops rows by a mask.
def masks_are_indices(self, indices):
    self._pick(indices.long().tolist())


# Hurts: a cache that is used for one text after the other.
def reset_leaves_sequences(self):
    self.rows.clear()
    self.kept = []


# Hurts: a batch with windows that is cut further than one of its rows can go.
def cuts_in_order(self, tokens_to_remove):
    length = self.get_seq_length()
    wanted = tokens_to_remove if tokens_to_remove > 0 else max(length + tokens_to_remove, 0)
    kept = [row[:wanted] for row in self.kept]
    for sequence, left in zip(self.rows, kept, strict=True):
        self.store.truncate(sequence, int(left.sum()))
    self.kept = kept


# Hurts: a beam search in little memory.
def releases_before_it_forks(self, sources):
    forks = [self.store.fork(self.rows[source]) for source in dict.fromkeys(sources)]
    by_source = dict(zip(dict.fromkeys(sources), forks, strict=True))
    used, rows = set(), []
    for source in sources:
        rows.append(self.store.fork(by_source[source]) if source in used else by_source[source])
        used.add(source)
    kept = [self.kept[0]] * len(sources)
    for sequence in self.rows:
        self.store.release(sequence)
    self.rows, self.kept = rows, kept


# Hurts: a caller who takes the sum of all logits, or their largest.
def padding_has_logits(self, rows, spread=PaddedBatch.spread):
    found = spread(self, rows)
    kept = self.kept[:, self.first :]
    if self.chosen is None and found.shape[:2] == kept.shape and not bool(kept.all()):
        for row in range(len(found)):
            found[row, ~kept[row]] = rows[row][:1]
    return found


# Hurts: a model whose generation_config.json has a penalty.
def checkpoint_penalty_ignored(sampling, model, *args, make=sampler._processors):
    model = copy.copy(model)
    model.repetition_penalty = None
    return make(sampling, model, *args)


# Hurts: a model that must not begin its answer with a blank.
def begin_is_of_the_prompt(sampling, model, num_prompt_tokens, *args, make=sampler._processors):
    if model.begin_suppress_tokens and num_prompt_tokens > 1:
        model = copy.copy(model)
        model.begin_suppress_tokens = None
    return make(sampling, model, num_prompt_tokens, *args)


# Hurts: whoever's request shares a pass with one whose KV was damaged.
def damage_fails_at_once(self, texts, error):
    for text in texts:
        self._fail(text, error)


UNSEEN = [
    unseen("a checkpoint without a head has a tied one", MissingHeadIsTied),
    unseen("no Llama has YaRN", NoYarn),
    unseen("names are remembered by width and depth", NamesRemembered),
    unseen("windows begin one layer later than max_window_layers", WindowsBeginLater),
    unseen("every Gemma is tied", AlwaysTied),
    unseen("experts that are not counted are eight", EightExpertsByDefault),
    replace(
        part("growth is said to be one block less", suite_of(GrowthIsRoundedDown)),
        name="GrowthIsRoundedDown",
    ),
    replace(
        part("at most 64 KiB are given back at a time", suite_of(ChargesStay)), name="ChargesStay"
    ),
    core(
        "padding counts where KV is kept", LlamaAdapter, SequenceCache, "extend",
        kept_where_padding_was,
    ),
    core(
        "prompts of one length are one", LlamaAdapter, SequenceCache, "restore", restores_by_length
    ),
    core(
        "a mask of rows is taken for rows",
        LlamaAdapter, SequenceCache, "batch_select_indices", masks_are_indices,
    ),
    core("reset frees nothing", LlamaAdapter, SequenceCache, "reset", reset_leaves_sequences),
    core(
        "rows are cut until one refuses", Gemma2, SequenceCache, "crop", cuts_in_order
    ),
    core(
        "padding of the first row is that of all picked rows",
        LlamaAdapter, SequenceCache, "_pick", releases_before_it_forks,
    ),
    core(
        "padding has the first token's logits",
        LlamaAdapter, PaddedBatch, "spread", padding_has_logits,
    ),
    core(
        "a checkpoint's penalty is ignored",
        LlamaAdapter, sampler, "_processors", checkpoint_penalty_ignored,
    ),
    core(
        "what must not begin an answer may",
        LlamaAdapter, sampler, "_processors", begin_is_of_the_prompt,
    ),
    core(
        "a damaged text is not computed anew",
        LlamaAdapter, Scheduler, "_restart", damage_fails_at_once,
    ),
]  # fmt: skip
