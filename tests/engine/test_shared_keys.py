"""Keys and values that layers hand to later ones: each chunk's as they were handed on, kept once.
Whole models do so in tests/test_types.py of ollm-adapter-transformers.
"""

import pytest
import torch

from ollm_core import UnsupportedError
from ollm_core.device.offload import ActivationOffload
from ollm_core.engine.shared_keys import SharedKeys, check_shared
from ollm_core.model.own_forward import LayerArguments

CPU = torch.device("cpu")


def called_with(**pairs):
    """What a layer is called with, `pairs` being in the mapping."""
    return LayerArguments((), {"mask": None, "shared": dict(pairs)}, "")


def handed_on(all_tokens, end, window=None):
    """Keys and values up to `end`, as a cache answers with them: all, or the last of a window."""
    first = 0 if window is None else max(0, end - window)
    return tuple(one[:, :, first:end] for one in all_tokens)


@pytest.mark.parametrize("on_host", [False, True])
def test_each_chunk_sees_what_was_handed_on(on_host):
    """All tokens so far, or those of a window, in memory of its own; keys and values may be of
    different sizes. Eleven tokens are there before the first chunk.
    """
    offload = ActivationOffload(CPU, on_host=on_host)
    full = torch.randn(2, 3, 41, 8), torch.randn(2, 3, 41, 5)
    sliding = torch.randn(2, 1, 41, 4), torch.randn(2, 1, 41, 4)
    kept, before, begin = [], None, 11
    for end in (20, 30, 41):
        before = SharedKeys(offload, before)
        told = called_with(full=handed_on(full, end))
        before.keep(told, end - begin)
        told.options["shared"]["sliding"] = handed_on(sliding, end, 6 + end - begin)
        before.keep(told, end - begin)
        kept.append((before, begin, end))
        begin = end
    for one, begin, end in kept:
        told = called_with()
        one.fill(told)
        found = told.options["shared"]
        assert found.keys() == {"full", "sliding"}
        wanted = {"full": (full, None), "sliding": (sliding, 6 + end - begin)}
        for key, (tokens, window) in wanted.items():
            for value, like in zip(found[key], handed_on(tokens, end, window), strict=True):
                assert torch.equal(value, like)
                assert value.is_contiguous()


def test_tokens_are_kept_once():
    """Whatever the number of chunks."""
    tokens = torch.randn(1, 2, 64, 8), torch.randn(1, 2, 64, 8)
    before, num_bytes = None, 0
    for end in range(8, 65, 8):
        before = SharedKeys(ActivationOffload(CPU, on_host=False), before)
        before.keep(called_with(full=handed_on(tokens, end)), 8)
        parts = [part for one in before._kept.values() for part in one.parts]
        num_bytes += sum(part.untyped_storage().nbytes() for part in parts)
    assert num_bytes == sum(one.nbytes for one in tokens)


def test_something_else_is_refused():
    """Copies of keys are not known to be those of earlier chunks."""
    answer = torch.randn(1, 1, 3, 4), torch.randn(1, 1, 3, 4)
    known = torch.randn(1), torch.randn(1)
    check_shared(called_with(old=known, new=answer), [known], answer)
    for wrong in ((answer[0].clone(), answer[1]), (answer[0],), answer[::-1]):
        with pytest.raises(UnsupportedError, match="hands something else"):
            check_shared(called_with(old=known, new=wrong), [known], answer)
    with pytest.raises(UnsupportedError, match="hands something else"):
        check_shared(called_with(new=answer), [], None)
