"""Broken adapters and cores of which no check is known that it must fail."""

from __future__ import annotations

import functools
import time
from contextlib import contextmanager
from dataclasses import replace
from types import CellType, FunctionType, MappingProxyType

import torch
from broken import unseen
from families import GptOss, Granite, Qwen3, Qwen3Moe
from transformers import StoppingCriteriaList

import ollm
from ollm_adapter_gpt_oss import GptOssAdapter
from ollm_adapter_llama import LlamaAdapter
from ollm_adapter_qwen3_next import Qwen3NextAdapter
from ollm_core import CheckpointError, DecoderAdapter, ParameterSource, mxfp4_source
from ollm_core.attention.blockwise import BlockwiseAttention
from ollm_core.attention.kernels import CpuFlash
from ollm_core.checkpoint.safetensors import check_unchanged
from ollm_core.engine.layer_call import LayerCall
from ollm_core.generate.causal_lm import StreamedModel
from ollm_core.kv.block_table import BlockKVStore
from ollm_core.kv.disk.prefix_cache import KeepingKVStore
from ollm_core.kv.disk.storage import DiskKVStore
from ollm_core.kv.in_memory import MemoryStorage
from ollm_core.kv.recurrent.hybrid import HybridKVStore
from ollm_core.model.fingerprint import identity

# Adapters.


# Hurts: a Llama config that was made from Mistral's and still says sliding_window: a prompt longer
# than that and a block ends in a KVStoreError.
class BelievesWindows(LlamaAdapter):
    def layer_types(self, config):
        return DecoderAdapter.layer_types(self, {**config, "layer_types": None})


# Hurts: a tied checkpoint that was saved with lm_head.weight alone does not open.
class WantsTheEmbeddingsName(LlamaAdapter):
    def weights(self, config, tensor_names):
        names = frozenset(tensor_names)
        if "model.embed_tokens.weight" not in names:
            raise CheckpointError("the checkpoint lacks tensor model.embed_tokens.weight")
        return super().weights(config, names)


# Hurts: a model with biases whose config.json does not say attention_bias answers without them.
class DropsBiases(LlamaAdapter):
    def ignores(self, config, tensor):
        return tensor.endswith(".bias")


# Hurts: a config.json that was cut to fewer layers than the checkpoint has, or is of the smaller
# model, is half used and answers nonsense.
class DropsFurtherLayers(Granite):
    def ignores(self, config, tensor):
        prefix, _, rest = tensor.partition("model.layers.")
        number = rest.partition(".")[0]
        return not prefix and number.isdigit() and int(number) >= config["num_hidden_layers"]


# Hurts: gpt-oss-20b and 120b, whose stacks are not square, are refused when they are opened from
# disk. The tiny one's are square.
class TakesPackedStacksForSquare(GptOssAdapter):
    def experts(self, config, parameter):
        found = super().experts(config, parameter)
        if not parameter.endswith(".gate_up_proj") or not found or found[0].transform is None:
            return found
        hidden, inner = config["hidden_size"], config["intermediate_size"]
        return [mxfp4_source(parameter, 2 * inner, hidden, row) for row in range(len(found))]


# Hurts: a model with windows of 8,192 tokens, after 4,352: what its attention asks for is gone.
class ClampsWindows(GptOss):
    def caches(self, config):
        kinds = super().caches(config)
        return [replace(k, window=k.window and min(k.window, 4096)) for k in kinds]


# Hurts: longrope frequencies depend on the longest position: a prompt in chunks, and an answer that
# crosses the original length, are not what one forward gives.
class LetsLongropeIn(LlamaAdapter):
    def layout(self, config):
        rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
        if isinstance(rope, dict) and rope.get("rope_type") == "longrope":
            config = {**config, "rope_scaling": None, "rope_parameters": None}
        return super().layout(config)


# Hurts: `ollm list-models` and whoever makes room for a download: 42 GB for a model of 13.8 GB.
class ListsPackedAsHalves(GptOssAdapter):
    def catalog(self):
        return [replace(e, weight_bytes=2 * e.num_parameters) for e in super().catalog()]


# Hurts: a base model whose config.json says "eos_token_id": null stops at token 2, which is
# transformers' default for a Llama that says nothing.
class LeavesNullsOut(LlamaAdapter):
    def text_config(self, config):
        return {key: value for key, value in config.items() if value is not None}


# Hurts: checkpoints from before transformers 4.43, {"type": "linear", "factor": 4.0}: every token
# after the first is turned by wrong angles.
class KnowsNoOldRope(LlamaAdapter):
    def text_config(self, config):
        rope = config.get("rope_scaling")
        if isinstance(rope, dict) and "rope_type" not in rope:
            return {**config, "rope_scaling": None}
        return config


# Hurts: any run in bfloat16 or float16, as Qwen3-Next is published: the state does not fit its
# declaration, or the plan is too low.
class StatesInHalf(Qwen3NextAdapter):
    def recurrent_states(self, config):
        return [replace(state, float32=False) for state in super().recurrent_states(config)]


# Hurts: a model with attention_bias and without mlp_bias does not open.
class OneFlagForBiases(LlamaAdapter):
    def layer_parameters(self, config, layer_idx):
        flags = {"mlp_bias": config.get("attention_bias")}
        return super().layer_parameters({**config, **flags}, layer_idx)


# Hurts: Llama 1 and 2 7B, whose first config.json has no num_key_value_heads: 32 heads, not 8.
class EightHeadsUnlessSaid(LlamaAdapter):
    defaults = MappingProxyType({"num_key_value_heads": 8})


def _by_float(weight):
    return weight.float().to(weight.dtype)


# Hurts: in bfloat16 each down_proj is there twice more, in float32, which no account and no plan
# has: the device runs out of memory inside the stated budget.
class CopiesInFloat(Granite):
    def source(self, config, parameter):
        transform = _by_float if parameter.endswith("down_proj.weight") else None
        return ParameterSource((parameter,), transform)


# Hurts: Qwen3 models that list windows for their last layers only.
class LetsWindowsAlternate(Qwen3):
    def layer_types(self, config):
        found = super().layer_types(config)
        if "sliding_attention" not in found:
            return found
        return ["full_attention" if i % 2 else "sliding_attention" for i in range(len(found))]


# Hurts: a published config with a sliding_window that use_sliding_window turns off, fewer
# max_window_layers than layers and no layer_types: a prompt longer than that fails.
class TurnsWindowsOn(Qwen3):
    def layer_types(self, config):
        return super().layer_types({**config, "use_sliding_window": True})


# Hurts: `ollm plan config.json` of Llama 3.2 1B says 3.0 GB of weights, there are 2.5.
class PlansTheTiedHead(LlamaAdapter):
    def tensors(self, config, shapes, dtype):
        found = dict(super().tensors(config, shapes, dtype))
        if config.get("tie_word_embeddings"):
            found["lm_head.weight"] = found["model.embed_tokens.weight"]
        return found


# Hurts: an untied checkpoint whose last file was not fetched answers nonsense, and should be
# refused.
class TiesWhatIsLost(LlamaAdapter):
    def weights(self, config, tensor_names):
        names = frozenset(tensor_names)
        tied = config.get("tie_word_embeddings") or "lm_head.weight" not in names
        return super().weights({**config, "tie_word_embeddings": tied}, names)


# Hurts: whoever opens a second model in the same process, with as many layers and other windows or
# heads: an error, or a plan that is not its own.
class RemembersKinds(GptOss):
    seen: dict = {}  # noqa: RUF012 - that is what is wrong

    def caches(self, config):
        kinds = super().caches(config)
        return self.seen.setdefault(len(kinds), kinds)


# Hurts: Qwen3-MoE in its published form, which says num_experts, where those are not 128.
class KnowsOneKeyOfExperts(Qwen3Moe):
    def experts(self, config, parameter):
        return super().experts({"num_local_experts": 128, **config}, parameter)


# Cores.


def turn(thing, fault):
    """Let one object behave as `fault`, a class of methods, has it."""
    base = type(thing)
    made = type(base)(base.__name__, (base,), {})  # with two bases its layout would be another
    for name, method in vars(fault).items():
        if not name.startswith("__"):
            setattr(made, name, _moved(method, made))
    thing.__class__ = made


def _moved(method, owner):
    """A method whose `super()` is that of `owner`."""
    free = method.__code__.co_freevars
    if "__class__" not in free:
        return method
    cells = dict(zip(free, method.__closure__, strict=True)) | {"__class__": CellType(owner)}
    arguments = method.__code__, method.__globals__, method.__name__, method.__defaults__
    moved = FunctionType(*arguments, tuple(cells[name] for name in free))
    moved.__kwdefaults__ = method.__kwdefaults__
    moved.__dict__.update(method.__dict__)
    return moved


def turn_stores(model, kind, fault, part=None):
    """The same for each KV store of a kind that a model opens from now on, or a part of it."""
    open_store = model._open_store

    def opened(*args):
        tier, store = open_store(*args)
        for one in (store, getattr(store, "_attention", None)):
            if isinstance(one, kind):
                turn(one if part is None else getattr(one, part), fault)
        return tier, store

    model._open_store = opened


def turn_attention(model, change):
    """Give each attention of each pass to `change`, and use what it returns."""

    class Skeleton:
        def chunk_forward(self, layer_idx):
            run = super().chunk_forward(layer_idx)

            def stepped(hidden, **options):
                call = options["past_key_values"]
                if isinstance(call, LayerCall) and not hasattr(call, "changed"):
                    call.changed, call._attention = True, change(call._attention)
                return run(hidden, **options)

            return stepped

    turn(model.engine._skeleton, Skeleton)


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


class SharesWithoutOwning:
    def _share(self, layer_idx, source, table, num_tokens):
        super()._share(layer_idx, source, table, num_tokens)
        if self.geometry.kinds[layer_idx].window is not None:
            num_full = num_tokens // self.block_size
            shared = [block for i, block in table.blocks.items() if i < num_full]
            self._num_sharers.subtract((layer_idx, block) for block in shared)


# Hurts: beam search after a prompt of more than a block: a beam that is dropped takes the windows
# of the others with it.
def forks_do_not_own_windows(*args, **options):
    model = ollm.load(*args, **options)
    turn_stores(model, BlockKVStore, SharesWithoutOwning)
    return model


class UnsealsNothing:
    def unseal(self, layer_idx, block, tail):
        self._forget(layer_idx, block)


# Hurts: with KV on disk, a draft that is rejected, or a crop, across the end of a block: what the
# block held is zeros from then on.
def unseals_nothing_on_disk(*args, **options):
    model = ollm.load(*args, **options)
    turn_stores(model, DiskKVStore, UnsealsNothing, "_disk")
    return model


class ComparesABit:
    def _matches(self, token_ids):
        found = []
        for pin in self._pins:
            shorter = min(len(pin.token_ids), len(token_ids))
            other = (pin.token_ids[:shorter] != token_ids[:shorter]).nonzero().flatten()
            other = other[other % self.block_size < 64]
            found.append((pin, int(other[0]) if len(other) else shorter))
        return sorted(found, key=lambda one: one[1], reverse=True)


# Hurts: the same document with one word changed in a later part of a block: answers are about the
# old one.
def compares_the_start_of_each_block(*args, **options):
    model = ollm.load(*args, **options)
    turn_stores(model, KeepingKVStore, ComparesABit)
    return model


# Hurts: whoever changes rope_scaling or rope_theta in config.json and asks about the same document
# again: its keys are those of the old config.
def knows_models_by_weights_alone(*args, **options):
    model = ollm.load(*args, **options)
    checkpoint = model.engine._check_files.__self__
    request = model._open_store._request
    name = functools.partial(identity, checkpoint, {})
    model._open_store._request = replace(request, fingerprint=name)
    return model


def _tight(attention):
    def attend(module, query, view, **options):
        window = options.get("sliding_window")
        if window and query.shape[2] == 1 and set(view.starts) == {window - 1}:
            options["sliding_window"] = window - 1
        return attention(module, query, view, **options)

    return attend


# Hurts: the one decode step at which a text is as long as the window: it forgets the first token
# too early.
def forgets_when_the_window_is_just_full(*args, **options):
    model = ollm.load(*args, **options)
    turn_attention(model, _tight)
    return model


def _alike(attention):
    def attend(module, query, view, **options):
        if len(view.starts) > 2:
            view = replace(view, starts=(min(view.starts),) * len(view.starts))
        return attention(module, query, view, **options)

    return attend


# Hurts: three or more prompts of unequal lengths, decoded together: the longer ones do not see
# their last tokens.
def three_rows_have_one_past(*args, **options):
    model = ollm.load(*args, **options)
    turn_attention(model, _alike)
    return model


class RoundsSums(CpuFlash):
    def __call__(self, query, *args, **options):
        output, lse = super().__call__(query, *args, **options)
        return output, lse.to(query.dtype).float()

    def several(self, query, *args):
        found = super().several(query, *args)
        return found and (found[0], found[1].to(query.dtype).float())


def _rounded(attention):
    return BlockwiseAttention((RoundsSums(),)) if _is_blockwise(attention) else attention


def _is_blockwise(attention):
    return isinstance(attention, BlockwiseAttention)


# Hurts: long contexts in bfloat16, which are block-wise by default: parts are weighed with an error
# of some percent, more than transformers has.
def rounds_sums_in_half(*args, **options):
    model = ollm.load(*args, **options)
    turn_attention(model, _rounded)
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
    turn(model.engine._admission, CountsOneRow)
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


class ForksTheSameState:
    def fork(self, sequence, forked, num_tokens):
        super().fork(sequence, forked, num_tokens)
        if num_tokens:
            for layer_idx, layer in self._sequences[sequence].layers.items():
                copied = self._sequences[forked].layers[layer_idx]
                copied.at[num_tokens] = layer.at[num_tokens]


# Hurts: two questions on one document: from the second token of one answer on, the other goes on
# from its state.
def forks_share_their_states(*args, **options):
    model = ollm.load(*args, **options)
    turn_stores(model, HybridKVStore, ForksTheSameState, "_states")
    return model


class AlignsLeft:
    def put_state(self, layer_idx, sequence, num_new, state):
        convolution, recurrent = state
        begins = self.num_tokens(sequence, layer_idx) == 0
        if begins and num_new < convolution.shape[-1]:
            convolution = convolution.roll(num_new, -1)
        super().put_state(layer_idx, sequence, num_new, (convolution, recurrent))


# Hurts: a prompt of one to three tokens, fewer than the convolution's kernel: a base model that
# goes on from "The".
def short_prompts_lie_on_the_left(*args, **options):
    model = ollm.load(*args, **options)
    turn_stores(model, HybridKVStore, AlignsLeft, "_states")
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


class ForgetsItsCaches:
    @functools.wraps(StreamedModel.new_cache)
    def new_cache(self, *args, **options):
        cache = super().new_cache(*args, **options)
        self._belongings.caches.remove(cache.finalizer)
        return cache


# Hurts: a program that closes the model and still has the cache of a chat: its KV stays in memory,
# or on disk, where it is the user's text.
def caches_outlive_the_model(*args, **options):
    model = ollm.load(*args, **options)
    turn(model, ForgetsItsCaches)
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
        with self._cap(), self._admission.admit(store, work) as plan:
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


class GivesBackTwice:
    def free(self, layer_idx, blocks):
        super().free(layer_idx, blocks)
        self._charges.give("kv blocks", len(blocks) * self._block_bytes(layer_idx))


# Hurts: beam search, windows, and drafts that are rejected: with each block that is freed, the
# budget grows by one.
def frees_blocks_twice(*args, **options):
    model = ollm.load(*args, **options)
    open_store = model._open_store

    def opened(*args):
        tier, store = open_store(*args)
        storage = getattr(getattr(store, "_attention", store), "_storage", None)
        if isinstance(storage, MemoryStorage):
            turn(storage, GivesBackTwice)
        return tier, store

    model._open_store = opened
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


class ReordersInPlace:
    def reorder_cache(self, beam_idx):
        self.kept = [self.kept[source] for source in beam_idx.tolist()]
        for row, source in enumerate(beam_idx.tolist()):
            if row != source:
                forked = self.store.fork(self.rows[source])
                self.store.release(self.rows[row])
                self.rows[row] = forked


class OpensSuchCaches:
    @functools.wraps(StreamedModel.new_cache)
    def new_cache(self, *args, **options):
        cache = super().new_cache(*args, **options)
        turn(cache, ReordersInPlace)
        return cache


# Hurts: beam search, at each step where two beams change places, or one moves down that was
# replaced just before.
def reorders_beams_in_place(*args, **options):
    model = ollm.load(*args, **options)
    turn(model, OpensSuchCaches)
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


class ChecksTheFirstSlot:
    def _read_slots(self, layer_idx, slots, buffer):
        keys = [(layer_idx, slot) for slot in slots[1:] if (layer_idx, slot) in self.checksums]
        rest = {key: self.checksums.pop(key) for key in keys}
        try:
            super()._read_slots(layer_idx, slots, buffer)
        finally:
            self.checksums.update(rest)


# Hurts: a flipped bit in kept KV, in any block but the first of those that are read together: it is
# believed.
def checks_the_first_block_of_a_read(*args, **options):
    model = ollm.load(*args, **options)
    turn_stores(model, DiskKVStore, ChecksTheFirstSlot, "_disk")
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
