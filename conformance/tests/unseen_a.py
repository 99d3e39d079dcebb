"""Broken adapters and cores of which no check is known that it must fail."""

from __future__ import annotations

import functools
import time
from contextlib import contextmanager
from dataclasses import replace

import torch
from broken import unseen
from families import GptOss, Granite, Qwen3
from transformers import StoppingCriteriaList
from unseen_a_adapters import (
    BelievesWindows,
    ClampsWindows,
    CopiesInFloat,
    DropsBiases,
    DropsFurtherLayers,
    EightHeadsUnlessSaid,
    KnowsNoOldRope,
    KnowsOneKeyOfExperts,
    LeavesNullsOut,
    LetsLongropeIn,
    LetsWindowsAlternate,
    ListsPackedAsHalves,
    OneFlagForBiases,
    PlansTheTiedHead,
    RemembersKinds,
    StatesInHalf,
    TakesPackedStacksForSquare,
    TiesWhatIsLost,
    TurnsWindowsOn,
    WantsTheEmbeddingsName,
)
from unseen_a_attentions import (
    forgets_when_the_window_is_just_full,
    rounds_sums_in_half,
    three_rows_have_one_past,
)
from unseen_a_caches import (
    caches_outlive_the_model,
    checks_the_first_block_of_a_read,
    compares_the_start_of_each_block,
    forks_do_not_own_windows,
    forks_share_their_states,
    frees_blocks_twice,
    knows_models_by_weights_alone,
    reorders_beams_in_place,
    short_prompts_lie_on_the_left,
    unseals_nothing_on_disk,
)
from unseen_turns import turn

import ollm
from ollm_adapter_llama import LlamaAdapter
from ollm_adapter_qwen3_next import Qwen3NextAdapter
from ollm_core.checkpoint.safetensors import check_unchanged
from ollm_core.generate.causal_lm import StreamedModel


# Hurts: Llama 3 instruct models, which have three stop tokens: an answer that ends with <|eot_id|>
# goes on.
def stops_at_the_first_stop_token(*args, **options):
    model = ollm.load(*args, **options)
    config = model.generation_config
    if isinstance(config.eos_token_id, list):
        config.eos_token_id = config.eos_token_id[0]
    return model


class HoldsAfterFailure:
    @contextmanager
    def holding(self, kind, num_bytes):
        self.reserve(kind, num_bytes)
        yield
        self.release(kind, num_bytes)


# Hurts: Ctrl-C in a chat, some times over: each leaves the memory of its pass reserved, until
# nothing fits any more.
def stays_reserved_after_failure(*args, **options):
    model = ollm.load(*args, **options)
    turn(model.accounts.device, HoldsAfterFailure)
    return model


class DemandsNothing:
    def demand_room(self, store, lengths):
        pass


# Hurts: a long answer that does not fit: it is refused after an hour, in the middle, and not before
# the first pass.
def finds_out_when_it_gets_there(*args, **options):
    model = ollm.load(*args, **options)
    turn(model.engine, DemandsNothing)
    return model


class CountsOneRow:
    def _needed(self, work, *args):
        return super()._needed([replace(item, num_logits=1) for item in work], *args)


# Hurts: scoring a text, model(ids) with the logits of all its tokens, and long drafts: with a
# vocabulary of 128k they are gigabytes beyond the budget.
def counts_one_row_of_logits(*args, **options):
    model = ollm.load(*args, **options)
    turn(model.engine._pass_planner, CountsOneRow)
    return model


class RemembersRows:
    def embed(self, token_ids):
        known = self.__dict__.setdefault("known_rows", {})
        ids = token_ids.tolist()
        missing = sorted({*ids} - known.keys())
        if missing:
            rows = super().embed(torch.tensor(missing))
            known.update((one, row.clone()) for one, row in zip(missing, rows, strict=True))
        return torch.stack([known[one] for one in ids])

    def close(self):
        super().close()
        self.__dict__.pop("known_rows", None)


# Hurts: a server that runs for a day: it ends up with the whole embedding in memory, up to 2 GB
# that no account knows.
def remembers_embedding_rows(*args, **options):
    model = ollm.load(*args, **options)
    turn(model.weights, RemembersRows)
    return model


class PadsOnTheLeft:
    @functools.wraps(StreamedModel.forward)
    def forward(self, input_ids=None, attention_mask=None, **options):
        if attention_mask is not None and attention_mask.ndim == 2:
            num_past = attention_mask.shape[1] - input_ids.shape[1]
            past, new = attention_mask[:, :num_past], attention_mask[:, num_past:]
            attention_mask = torch.cat([past, new.sort(dim=1).values], dim=1)
        return super().forward(input_ids, attention_mask, **options)


# Hurts: scoring a batch that is padded on the right, or masks tokens inside: others are left out
# than the mask says.
def takes_padding_to_be_on_the_left(*args, **options):
    model = ollm.load(*args, **options)
    turn(model, PadsOnTheLeft)
    return model


class KeepsOptions:
    @functools.wraps(StreamedModel.generate)
    def generate(self, *args, **options):
        for name, value in options.items():
            if hasattr(self.generation_config, name):
                setattr(self.generation_config, name, value)
        return super().generate(*args, **options)


# Hurts: a greedy call after a sampled one, or one without eos_token_id after one with: the options
# of the first still hold.
def options_stay_for_the_next_call(*args, **options):
    model = ollm.load(*args, **options)
    turn(model, KeepsOptions)
    return model


# Hurts: a checkpoint in several files of which the second is fetched again in another version while
# the model is open: tokens of two models, and no error.
def looks_at_the_first_file(*args, **options):
    model = ollm.load(*args, **options)
    files = model.engine._check_files.__self__.files
    first = dict(list(files.items())[:1])
    model.engine._check_files = functools.partial(check_unchanged, first)
    return model


class TakesAnyNumber:
    def _attempt(self, store, work):
        start = time.perf_counter()
        read_before = store.bytes_read
        self._expect(store, work)
        with self._cap(), self._pass_planner.admit(store, work) as plan:
            self.counters.count_kv_on_disk(store.tier_bytes().disk)
            logits = self._run(store, work, plan)
            self._check_files()
            for item in work:
                store.commit(item.sequence)
        seconds, kv_bytes_read = time.perf_counter() - start, store.bytes_read - read_before
        self.counters.count_pass(work, plan, seconds, kv_bytes_read)
        return logits


# Hurts: a bfloat16 model in float16, which overflows: a page of token 0 in place of one line that
# says so.
def hands_out_nan(*args, **options):
    model = ollm.load(*args, **options)
    turn(model.engine, TakesAnyNumber)
    return model


class DraftsPastTheEnd:
    def _get_candidate_generator(self, *args, **options):
        candidates = super()._get_candidate_generator(*args, **options)
        if hasattr(candidates, "_stopping_criteria"):
            candidates._stopping_criteria = StoppingCriteriaList()
        return candidates


# Hurts: draft="lookup" with stop strings, or stopping criteria of one's own, of which transformers
# asks only after a pass: what was drafted after them is part of the answer.
def drafts_past_the_end(*args, **options):
    model = ollm.load(*args, **options)
    turn(model, DraftsPastTheEnd)
    return model


class RemembersAngles:
    def embeddings(self, rotary, layer_idx, hidden, positions):
        if positions.is_meta or positions.shape[1] > 1:
            return super().embeddings(rotary, layer_idx, hidden, positions)
        known = self.__dict__.setdefault("known_angles", {})
        key = self.rotary_types[layer_idx], len(positions), int(positions[0, 0]), hidden.dtype
        if key not in known:
            known[key] = super().embeddings(rotary, layer_idx, hidden, positions)
        return known[key]

    def close(self):
        super().close()
        self.__dict__.pop("known_angles", None)


# Hurts: a second batch of as many rows whose first row is as long as the last one's was, and the
# others are not: they are turned by the angles of the first batch.
def remembers_the_angles_of_the_first_row(*args, **options):
    model = ollm.load(*args, **options)
    turn(model.engine._skeleton, RemembersAngles)
    return model


UNSEEN = [
    unseen("Takes a stray sliding_window for its layers' own.", BelievesWindows),
    unseen("Refuses a tied model that is stored under the head's name.", WantsTheEmbeddingsName),
    unseen("Takes any bias that config.json does not announce for superfluous.", DropsBiases),
    unseen("Takes layers beyond those of config.json for superfluous.", DropsFurtherLayers),
    unseen(
        "Swaps inputs and outputs of a packed stack, which are equal in the tiny model.",
        TakesPackedStacksForSquare,
    ),
    unseen("Keeps no window of more than 4,096 tokens.", ClampsWindows),
    unseen("Opens a model with longrope as if it had none.", LetsLongropeIn),
    unseen("Lists packed models with two bytes a parameter.", ListsPackedAsHalves),
    unseen("Takes a null of config.json for a key that is not there.", LeavesNullsOut),
    unseen("Ignores rope_scaling that names its kind as transformers 4 did.", KnowsNoOldRope),
    unseen("Declares recurrent states in the model's dtype, not in float32.", StatesInHalf),
    unseen("Takes the MLP to have biases where attention has some.", OneFlagForBiases),
    unseen("Assumes eight KV heads where config.json states none.", EightHeadsUnlessSaid),
    unseen("Makes a copy in float32 that it does not declare.", CopiesInFloat),
    unseen("Lets windows alternate, whatever layers are listed.", LetsWindowsAlternate),
    unseen("Reads sliding_window though use_sliding_window is false.", TurnsWindowsOn),
    unseen("Plans a tied head as a tensor of its own.", PlansTheTiedHead),
    unseen("Ties a head that the checkpoint has lost.", TiesWhatIsLost),
    unseen("Gives each model the caches of the first with as many layers.", RemembersKinds),
    unseen("Counts 128 experts unless they go by transformers' own key.", KnowsOneKeyOfExperts),
    unseen(
        "Stops at the first of several stop tokens only.",
        LlamaAdapter,
        load=stops_at_the_first_stop_token,
    ),
    unseen(
        "A pass that fails leaves its device memory reserved.",
        LlamaAdapter,
        load=stays_reserved_after_failure,
    ),
    unseen(
        "A fork's full blocks in sliding layers are not counted as shared.",
        Qwen3,
        load=forks_do_not_own_windows,
    ),
    unseen(
        "On disk, a truncation into a sealed block does not read what it held.",
        LlamaAdapter,
        load=unseals_nothing_on_disk,
    ),
    unseen(
        "A kept prefix is compared in the first 64 tokens of each block.",
        LlamaAdapter,
        load=compares_the_start_of_each_block,
    ),
    unseen(
        "Kept KV is found again by the weights, whatever config.json says.",
        LlamaAdapter,
        load=knows_models_by_weights_alone,
    ),
    unseen(
        "A decode step forgets a token when the window has just been filled.",
        GptOss,
        load=forgets_when_the_window_is_just_full,
    ),
    unseen(
        "Of more than two rows each has the past of the shortest.",
        LlamaAdapter,
        load=three_rows_have_one_past,
    ),
    unseen(
        "Block-wise attention rounds its sums to the model's half precision.",
        LlamaAdapter,
        load=rounds_sums_in_half,
    ),
    unseen(
        "Nobody asks before the first pass whether the last one fits.",
        LlamaAdapter,
        load=finds_out_when_it_gets_there,
    ),
    unseen(
        "A pass counts the logits of one token a row, however many are asked for.",
        Granite,
        load=counts_one_row_of_logits,
    ),
    unseen(
        "Rows of the embedding are kept once they were read, in no account.",
        LlamaAdapter,
        load=remembers_embedding_rows,
    ),
    unseen(
        "A fork's recurrent states are those of its source, not copies.",
        Qwen3NextAdapter,
        load=forks_share_their_states,
    ),
    unseen(
        "The convolution's state lies on the wrong side after a prompt shorter than its kernel.",
        Qwen3NextAdapter,
        load=short_prompts_lie_on_the_left,
    ),
    unseen(
        "Padding is taken to be on the left, wherever the mask has it.",
        LlamaAdapter,
        load=takes_padding_to_be_on_the_left,
    ),
    unseen(
        "Options of one call of generate hold for the next.",
        LlamaAdapter,
        load=options_stay_for_the_next_call,
    ),
    unseen(
        "Closing the model does not close caches that are still referred to.",
        LlamaAdapter,
        load=caches_outlive_the_model,
    ),
    unseen(
        "Only the first of a checkpoint's files is watched for changes.",
        LlamaAdapter,
        load=looks_at_the_first_file,
    ),
    unseen("Logits that are no numbers are handed out.", LlamaAdapter, load=hands_out_nan),
    unseen(
        "KV blocks in memory are given back to their account twice.",
        LlamaAdapter,
        load=frees_blocks_twice,
    ),
    unseen(
        "A draft is not cut where it would end the text.", LlamaAdapter, load=drafts_past_the_end
    ),
    unseen(
        "Beams are reordered one after the other, in place.",
        Granite,
        load=reorders_beams_in_place,
    ),
    unseen(
        "The angles of a decode step are remembered by the position of the first row alone.",
        LlamaAdapter,
        load=remembers_the_angles_of_the_first_row,
    ),
    unseen(
        "Of blocks on disk that are read together the first alone is checked.",
        LlamaAdapter,
        load=checks_the_first_block_of_a_read,
    ),
]
