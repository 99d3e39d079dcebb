"""Prompts that were broken off, and are gone on with in another state than they were left in. For
tests only.
"""

from __future__ import annotations

from broken import broken_adapter, while_it_runs

from ollm_adapter_llama import LlamaAdapter
from ollm_adapter_qwen3_next import Qwen3MoeAdapter, Qwen3NextAdapter
from ollm_core.engine import checkpoint
from ollm_core.engine.checkpoint import PassCheckpoint
from ollm_core.kv.disk.checkpoints import DiskCheckpoint
from ollm_core.kv.disk.storage import DiskStorage
from ollm_core.kv.recurrent.prefix_cache import _States


def in_core(sentence, adapter, owner, name, fault, check="failure.resumed"):
    """A core in which `name` of `owner` is `fault`, with a good adapter."""

    def load():
        """Names the mutant."""

    load.__name__ = fault.__name__
    made = broken_adapter(
        check, sentence, adapter, load=load, broken=while_it_runs(owner, name, fault)
    )
    del made.suite.load
    return made


def inputs_of_layers_saved(self, num_done, hidden, *, after=PassCheckpoint.after_layer):
    given = self.__dict__.get("given") or hidden
    self.given = [one.clone() for one in hidden]
    after(self, num_done, given)


def goes_on_a_layer_later(self, *args, init=PassCheckpoint.__init__):
    init(self, *args)
    self.first_layer = min(self.first_layer + bool(self.first_layer), 2)


def first_state_not_saved(self, sequence, num_done, *, states=_States.states):
    for number, state in enumerate(states(self, sequence, num_done)):
        yield state if number else state.new_zeros(state.shape)


def end_of_the_last_block_not_written(self, *args):
    pass


def any_settings_will_do(*args):
    return {}


def saved_in_half(self, num_done, hidden, *, save=DiskCheckpoint.save):
    return save(self, num_done, [one.bfloat16().to(one.dtype) for one in hidden])


def never_written(self, num_done, hidden):
    return False


def chunks_before_the_last_one(self, num_done, hidden, *, save=DiskCheckpoint.save):
    return save(self, num_done, [one if i else one * 0 for i, one in enumerate(hidden)])


BROKEN_RESUMED = [
    in_core(
        "What a layer was given is saved as what it gave.",
        LlamaAdapter, PassCheckpoint, "after_layer", inputs_of_layers_saved,
    ),
    in_core(
        "The layer after the last one that is done is left out.",
        LlamaAdapter, PassCheckpoint, "__init__", goes_on_a_layer_later,
    ),
    in_core(
        "The first of the recurrent states is not saved.",
        Qwen3NextAdapter, _States, "states", first_state_not_saved,
    ),
    in_core(
        "What has not filled a block of KV is not written.",
        Qwen3MoeAdapter, DiskStorage, "write_part", end_of_the_last_block_not_written,
    ),
    in_core(
        "A prompt in chunks of another size goes on with it.",
        LlamaAdapter, checkpoint, "bits_depend_on", any_settings_will_do,
    ),
    in_core(
        "Hidden states are saved in half precision.",
        LlamaAdapter, DiskCheckpoint, "save", saved_in_half,
    ),
    in_core(
        "Nothing is ever written.",
        LlamaAdapter, DiskCheckpoint, "save", never_written,
    ),
    in_core(
        "The first chunk's hidden states are not written.",
        Qwen3NextAdapter, DiskCheckpoint, "save", chunks_before_the_last_one,
    ),
]  # fmt: skip
