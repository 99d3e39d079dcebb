"""The store of a model in which no layer has keys: its states say how long a sequence is."""

import pytest
import torch

from ollm_core.contracts.kv import CacheKind, KVGeometry, StateShape
from ollm_core.errors import KVStoreError
from ollm_core.kv.recurrent.hybrid import HybridKVStore
from ollm_core.kv.recurrent.no_keys import NoKeysStore
from ollm_core.kv.recurrent.states import StateStore
from ollm_core.memory.accounts import MemoryAccount


def test_states_alone():
    """A layer of states and one of nothing: tokens are counted, cut and forked by the states."""
    kinds = (CacheKind("recurrent", states=(StateShape((3,)),)), CacheKind("none"))
    cpu = torch.device("cpu")
    geometry = KVGeometry(kinds, torch.float32, cpu)
    account = MemoryAccount("host memory", 1 << 20)
    states = StateStore(geometry, account, "host", cpu)
    with HybridKVStore(geometry, NoKeysStore(geometry), states) as store:
        sequence = store.new_sequence()
        assert store.num_tokens(sequence) == 0
        store.reserve(sequence, 5)
        store.put_state(0, sequence, 5, [torch.ones(3)])
        store.commit(sequence)
        assert [store.num_tokens(sequence, layer_idx) for layer_idx in (0, 1)] == [5, 5]
        forked = store.fork(sequence)
        assert store.num_tokens(forked) == 5
        store.truncate(sequence, 0)
        assert (store.num_tokens(sequence), store.num_tokens(forked)) == (0, 5)
        assert store.tier_bytes().disk == 0
        with pytest.raises(KVStoreError, match="layer 1 has no keys"):
            store.append(1, sequence, torch.ones(1, 1, 1), torch.ones(1, 1, 1))
