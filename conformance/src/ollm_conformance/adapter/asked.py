"""Checks of what a call of the model may ask for, beside logits."""

from __future__ import annotations

import torch

from ollm_conformance.adapter.base import AdapterSuite
from ollm_conformance.arguments import argument_values
from ollm_conformance.checks import check
from ollm_conformance.compare import same_bits, same_within
from ollm_conformance.subject import Subject, left_padded
from ollm_core import OllmError

_MASKED = -100
"""A label that does not count."""


class Asked(AdapterSuite):
    """Arguments of `forward`."""

    @check(
        "exact.forward",
        "A call gives a tuple where it is asked to, in transformers' order, with a cache or "
        "without; and the loss of transformers, where labels are left out in part, in a whole row "
        "of a batch, or shifted already.",
        look="core calls the model: an adapter has no part in it; run exact.resident first",
        needs=["batch"],
    )
    def test_forward(self, subject: Subject) -> None:
        reference = subject.reference().model
        ids = torch.stack([subject.prompt(30, seed=number) for number in range(3)])
        labels = ids.clone()
        labels[0, :12] = _MASKED
        labels[1] = _MASKED
        shifted = torch.nn.functional.pad(labels, (0, 1), value=_MASKED)[:, 1:].contiguous()
        with subject.open() as model:
            for given in ({"labels": labels}, {"labels": labels, "shift_labels": shifted}):
                found = model(input_ids=ids, **given)
                with torch.no_grad():
                    expected = reference(input_ids=ids, use_cache=False, **given)
                same_within(found.loss, expected.loss, 1e-4, f"loss, given {', '.join(given)}")
            whole = model(input_ids=ids[:1])
            assert whole.past_key_values is None, "expected no cache that nobody asked for, got one"
            for number in (1, 2):  # logits, and a cache if there is one
                cache = model.new_cache() if number == 2 else None
                found = model(input_ids=ids[:1], past_key_values=cache, return_dict=False)
                what = f"return_dict=False {'with' if cache else 'without'} a cache"
                assert isinstance(found, tuple), f"{what}: expected a tuple, got {type(found)}"
                assert len(found) == number, f"{what}: expected {number} parts, got {len(found)}"
                same_bits(found[0], whole.logits, f"{what}: logits")
            model.config.return_dict = False
            found = model(input_ids=ids[:1])
            assert isinstance(found, tuple), "config.return_dict = False: expected a tuple"
            model.config.return_dict = True
            used = model(input_ids=ids[:1], use_cache=True).past_key_values
            length = used.get_seq_length()
            assert length == 30, f"use_cache=True: expected a cache of 30 tokens, got {length}"

    @check(
        "exact.arguments",
        "Whatever argument of transformers a call is given, what comes out is what transformers "
        "gives for it, every part of it, or the call is refused in one line.",
        look="core calls the model: an adapter has no part in it; run exact.resident first",
        needs=["batch"],
    )
    def test_arguments(self, subject: Subject) -> None:
        reference = subject.reference().model
        ids, mask = left_padded([subject.prompt(n, seed=n) for n in (9, 20)])
        always = {"input_ids": ids, "attention_mask": mask}
        sizes = reference.config.get_text_config()
        with subject.open() as model:
            for name, values in argument_values(mask, sizes.hidden_size).items():
                for number, value in enumerate(values):
                    what = f"{name}, value {number} of {len(values)}"
                    try:
                        found = model(**always, **{name: value})
                    except OllmError:
                        assert number, f"{what}: expected what says nothing to be taken, got none"
                        continue
                    known = name != "no_such_argument" and (name, value) != ("use_cache", None)
                    given = {name: value} if known else {}
                    with torch.no_grad():
                        expected = reference(**always, **{"use_cache": False} | given)
                    missing = expected.keys() - found.keys()
                    assert not missing, f"{what}: expected {sorted(missing)}, got {[*found]}"
                    real = mask.bool()
                    if name == "logits_to_keep":
                        real = (
                            real[:, value] if isinstance(value, torch.Tensor) else real[:, -value:]
                        )
                    what = f"logits, given {what}"
                    same_within(found.logits[real], expected.logits[real], 1e-4, what)
