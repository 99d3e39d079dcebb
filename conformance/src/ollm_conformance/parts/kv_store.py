"""The contract of a KV store."""

from __future__ import annotations

from collections.abc import Callable

import torch
from hypothesis.stateful import run_state_machine_as_test

from ollm_conformance.checks import check
from ollm_conformance.parts.base import examples, refusal
from ollm_conformance.parts.kv_content import KVContent
from ollm_conformance.parts.kv_machine import KVStoreMachine
from ollm_conformance.parts.kv_memory import KVMemory
from ollm_conformance.parts.kv_size import KVSize
from ollm_conformance.parts.kv_sliding import KVSliding
from ollm_conformance.parts.kv_suite import SMALL
from ollm_core import KVStoreError


class KVStoreConformance(KVContent, KVMemory, KVSize, KVSliding):
    """Every check of a KV store. Subclass it as `TestX` and write `open_store`."""

    @check(
        "kv-store.wrong-requests",
        "Tokens, layers and sequences that are not there, and foreign shapes and dtypes, are "
        "refused as they are asked for.",
        look="raise KVStoreError, in one line, before anything changes",
    )
    def test_wrong_requests(self) -> None:
        with self.opened() as opened:
            store = opened.store
            sequence = store.new_sequence()
            expected = opened.fill(sequence, 6)
            one = SMALL.random(1, 0)
            other = torch.float16
            requests: dict[str, Callable[[], object]] = {
                "a fork at more tokens": lambda: store.fork(sequence, 7),
                "a fork at -1": lambda: store.fork(sequence, -1),
                "a fork of an unknown sequence": lambda: store.fork(99),
                "more tokens than there are": lambda: list(store.blocks(0, sequence, 7)),
                "-1 tokens": lambda: list(store.blocks(0, sequence, -1)),
                "the length of layer 2": lambda: store.num_tokens(sequence, 2),
                "the length of an unknown sequence": lambda: store.num_tokens(99),
                "keys for layer 2": lambda: store.append(2, sequence, one[0], one[1]),
                "keys of another dtype": lambda: store.append(
                    0, sequence, one[0].to(other), one[1].to(other)
                ),
                "fewer heads": lambda: store.append(0, sequence, one[0, :2], one[1, :2]),
                "longer heads": lambda: store.append(
                    0, sequence, one[0].repeat(1, 1, 2), one[1].repeat(1, 1, 2)
                ),
                "more keys than values": lambda: store.append(
                    0, sequence, one[0].repeat(1, 2, 1), one[1]
                ),
                "vectors": lambda: store.append(0, sequence, torch.zeros(3), torch.zeros(3)),
            }
            for what, request in requests.items():
                refusal(KVStoreError, request, what)
                opened.expect(sequence, expected, f"after refusing {what}")

    @check(
        "kv-store.state-machine",
        "Whatever calls follow one another, the store holds what plain lists would.",
        look="the calls that the message lists: they are the fewest that show it",
    )
    def test_state_machine(self) -> None:
        opened = self.opened

        class Machine(KVStoreMachine):
            def __init__(self) -> None:
                super().__init__(lambda stack: stack.enter_context(opened()))

        run_state_machine_as_test(Machine, settings=examples(self.num_examples))
