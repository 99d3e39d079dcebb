"""One pass over sequences with different numbers of new tokens, and each of them alone."""

from __future__ import annotations

from ollm_core.engine.batch import NewTokens


def alone(model, store, ids):
    """The logits of a prompt, a decode step and a draft, each in a pass of its own, and the same
    work anew, to be done in one pass.
    """
    prompts = [ids(90, seed=1), ids(40, seed=2), ids(33, seed=3)]
    expected, work = [], []
    for prompt, num_new in zip(prompts, (90, 1, 4), strict=True):
        split = len(prompt) - num_new
        for keep in (True, False):
            sequence = store.new_sequence()
            if split:
                model.engine.run(store, [NewTokens(sequence, prompt[:split], 0)])
            item = NewTokens(sequence, prompt[split:], split, num_new)
            if keep:
                work.append(item)
            else:
                expected += model.engine.run(store, [item])
    return expected, work
