"""A short run of a checkpoint, beside transformers' own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from ollm_conformance.compare import same_bits
from ollm_conformance.kinds import same_kinds
from ollm_conformance.subject import Reference, Subject
from ollm_core import Config
from ollm_core.testing import StreamedModel, bound_parameters

_PROMPT = 50
_STEPS = 3


@dataclass(frozen=True, slots=True)
class ShortRun:
    """What transformers makes of a prompt of 50 tokens and of some steps after it."""

    reference: Reference
    cache: DynamicCache
    inputs: list[Tensor]
    """Tokens [T] of the prompt, then of each step."""
    logits: list[Tensor]
    """[T, V] for each of them."""


def same_model(subject: Subject, config: Config, what: str, steps: int = _STEPS) -> None:
    """Raises AssertionError unless a random checkpoint with `config` as its config.json is, bit for
    bit, what transformers makes of it: caches, every parameter, and the logits of a short run.
    """
    directory = subject.checkpoint(config)
    expected = _run(Reference(directory, torch.float32), subject, steps)
    try:
        text = subject.adapter.text_config(config)
        same_kinds(subject.adapter.caches(text), expected.cache, what)
        with subject.open(directory) as model:
            cache = model.new_cache()
            found = [
                model(input_ids=ids[None], past_key_values=cache).logits[0]
                for ids in expected.inputs
            ]
            same_parameters(subject, model, text, expected.reference, what)
        for step, (one, logits) in enumerate(zip(found, expected.logits, strict=True)):
            same_bits(one, logits, f"{what}: logits of {f'step {step}' if step else 'the prompt'}")
    except AssertionError:
        raise
    except Exception as error:
        raise AssertionError(
            f"{what}: expected a run, got {type(error).__name__}: {' '.join(str(error).split())}"
        ) from error


def _run(reference: Reference, subject: Subject, steps: int) -> ShortRun:
    vocab_size = reference.model.config.get_text_config().vocab_size
    found = ShortRun(reference, reference.new_cache(), [], [])
    ids = subject.prompt(_PROMPT, vocab_size=vocab_size)
    for _ in range(1 + steps):
        found.inputs.append(ids)
        found.logits.append(reference.run(ids, cache=found.cache))
        ids = found.logits[-1][-1:].argmax(-1)
    return found


def same_parameters(
    subject: Subject, model: StreamedModel, config: Config, reference: Reference, what: str
) -> None:
    """Raises AssertionError unless a model with this text config gives its layers, bit for bit, the
    parameters of `reference`, and its buffers that are stored: all of them, and no other.
    """
    expected = dict(reference.model.state_dict())
    for name, found in bound_parameters(model, subject.adapter.layout(config)):
        if name not in expected:
            raise AssertionError(f"{what}: expected parameters of transformers, got {name} too")
        same_bits(found, expected.pop(name).data, f"{what}: parameter {name}")
    assert not expected, f"{what}: expected parameter {min(expected)}, got none"
