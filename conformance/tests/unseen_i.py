"""Faults of the kinds of unseen_h.py in other places, by the author of the checks that it led to.
For tests only.
"""

from __future__ import annotations

from dataclasses import replace

from broken import unseen, while_it_runs
from broken_kv_stores import disk_suite_of
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor
from turned_codec import Turned
from turned_codec import suite_of as codec_suite_of
from unseen_d import core, part
from unseen_h import Glm4

from ollm_adapter_llama import LlamaAdapter
from ollm_core import KVStoreError
from ollm_core.generate import arguments
from ollm_core.kv.disk.storage import DiskKVStore
from ollm_core.serving import sampler
from ollm_core.serving.answer import Answer
from ollm_core.serving.live import LiveText
from ollm_core.serving.texts import GeneratedText
from ollm_core.text.detokenizer import Detokenizer


# Hurts: a request with min_p alone.
def min_p_beside_top_p(sampling, *args, make=sampler._processors):
    return make(replace(sampling, min_p=0.0) if sampling.top_p == 1.0 else sampling, *args)


# Hurts: a long prompt whose words are to come no more.
class PenaltyOfTheLastTwenty(RepetitionPenaltyLogitsProcessor):
    def __call__(self, input_ids, scores):
        return super().__call__(input_ids[:, -20:], scores)


# Hurts: a client that takes the first of the likeliest tokens.
def likeliest_by_their_ids(logprobs, number, tell=sampler.most_likely):
    return tuple(sorted(tell(logprobs, number)))


# Hurts: a request that wants the marks of tool calls in its text: it has all others, too.
def shown_shows_all(self, tokenizer, shown=(), init=Detokenizer.__init__):
    init(self, tokenizer, shown)
    self._hidden = frozenset()


# Hurts: an answer that ends by its length in what might have been a stop text.
def held_is_lost_at_the_length(self, finish=Answer.finish):
    self._held = ""
    return finish(self)


# Hurts: how likely a prompt is, where it was read before.
def prompt_is_found_anyway(self):
    return LiveText.num_to_find.fget(self)


_HIDDEN = {**arguments.FINE, "output_hidden_states": (lambda *_: True, "")}


# Hurts: `ollm plan` of a GLM 4 in float32: half of its bytes.
class PlansInBfloat16(Glm4):
    def tensors(self, config, shapes, dtype):
        return super().tensors(config, shapes, "BF16")


# Hurts: weights that are damaged after the first pass.
class VerifiesOnce(Turned):
    def __init__(self):
        self.verified = set()

    def verify(self, name, turned, checksum):
        if name not in self.verified:
            super().verify(name, turned, checksum)
            self.verified.add(name)


# Hurts: whoever releases a sequence twice.
class UnknownOnesAreErrors(DiskKVStore):
    def release(self, sequence):
        if sequence not in self._tables:
            raise KVStoreError(f"no sequence {sequence}")
        super().release(sequence)


VerifiesOnceSuite = codec_suite_of(VerifiesOnce)
VerifiesOnceSuite.__name__ = "VerifiesOnceSuite"
UnknownOnesAreErrorsSuite = disk_suite_of(UnknownOnesAreErrors)
UnknownOnesAreErrorsSuite.__name__ = "UnknownOnesAreErrorsSuite"

_found = unseen(
    "prompts whose logprobs are told are found",
    LlamaAdapter,
    broken=while_it_runs(GeneratedText, "num_to_find", property(prompt_is_found_anyway)),
)
_hidden = unseen(
    "output_hidden_states is not looked at",
    LlamaAdapter,
    broken=while_it_runs(arguments, "FINE", _HIDDEN),
)

UNSEEN = [
    core("min_p alone is none", LlamaAdapter, sampler, "_processors", min_p_beside_top_p),
    core(
        "a penalty is of the last twenty tokens",
        LlamaAdapter, sampler, "RepetitionPenaltyLogitsProcessor", PenaltyOfTheLastTwenty,
    ),
    core(
        "the likeliest are sorted by id",
        LlamaAdapter, sampler, "most_likely", likeliest_by_their_ids,
    ),
    core("shown tokens show all", LlamaAdapter, Detokenizer, "__init__", shown_shows_all),
    core("what is held is lost", LlamaAdapter, Answer, "finish", held_is_lost_at_the_length),
    replace(_found, name="prompt_is_found_anyway"),
    replace(_hidden, name="hidden_states_are_not_missed"),
    unseen("a GLM is planned in bfloat16", PlansInBfloat16),
    part("a checksum is looked at once", VerifiesOnceSuite),
    part("to release what is unknown is an error", UnknownOnesAreErrorsSuite),
]  # fmt: skip
