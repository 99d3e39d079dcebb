"""Checks of what an adapter says of a checkpoint that is not there: `ollm plan` goes by it."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import pytest

from ollm_conformance.adapter.base import AdapterSuite
from ollm_conformance.checks import check, does_not_apply
from ollm_conformance.naming import Form, Names, kept_names
from ollm_conformance.subject import Subject
from ollm_core import Config, ModelAdapter
from ollm_core.testing import (
    DTYPE_BYTES,
    STORED_DTYPES,
    described_tensors,
    logical_tensors,
    open_checkpoint,
)

_LOOK = "source() and experts(), with `stored` where tensors are packed (tensors() if you wrote it)"
_NOTHING = "tensors() says nothing, so that models of this family are planned with files only"


class Stored(AdapterSuite):
    """Plans of models that are not on disk."""

    @check(
        "declaration.stored-tensors",
        "What the adapter says of a checkpoint that is not there is what the tiny checkpoint "
        "holds: each tensor, its dtype and its shape, with a head of its own or a tied one.",
        look=_LOOK,
    )
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_stored_tensors(self, subject: Subject, dtype: str) -> None:
        adapter = subject.adapter
        config = adapter.text_config(subject.config)
        directory = subject.tiny(dtype)
        checkpoint, logical = open_checkpoint(directory).tensors, logical_tensors(directory)
        unused = adapter.weights(config, logical.names).ignored
        ignored = {part for name in unused for part in logical.stored(name)}
        held = {t.name: (t.dtype, t.shape) for t in checkpoint.values() if t.name not in ignored}
        said = _said(adapter, config, kept_names(subject, config), dtype)
        same_forms(said, held, f"tiny checkpoint in {dtype}")
        for tied in (True, False):
            flipped = {**config, "tie_word_embeddings": tied}
            names = kept_names(subject, flipped)
            said = _said(adapter, flipped, names, dtype)
            what = f"tie_word_embeddings = {tied}, {dtype}"
            same_forms(said, names.stored(STORED_DTYPES[dtype]), what)

    @check(
        "declaration.stored-bytes",
        "Planned without its files, every model of the catalog has the tensors that transformers "
        "stores, and their bytes are its weight_bytes, less those of tensors that are ignored.",
        look="weight_bytes and ignored_bytes of the catalog's entry; " + _LOOK,
    )
    def test_stored_bytes(self, subject: Subject) -> None:
        adapter = subject.adapter
        entries = adapter.catalog()
        if not entries:
            does_not_apply("the catalog is empty")
        for entry in entries:
            config = adapter.text_config(entry.config)
            names = kept_names(subject, config)
            dtype = entry.config.get("dtype") or entry.config.get("torch_dtype")
            dtype = str(dtype or adapter.unstated_dtype)
            assert dtype in STORED_DTYPES, (
                f"{entry.id}: expected a dtype in its config, or unstated_dtype of the adapter, to "
                f"be one of {', '.join(STORED_DTYPES)}, got {dtype!r}"
            )
            said = _said(adapter, config, names, dtype)
            same_forms(said, names.stored(STORED_DTYPES[dtype]), entry.id)
            total = sum(DTYPE_BYTES[kind] * prod(shape) for kind, shape in said.values())
            used = entry.weight_bytes - entry.ignored_bytes
            assert used == total, (
                f"{entry.id}: expected weight_bytes - ignored_bytes = {total}, the bytes of its "
                f"tensors, got {entry.weight_bytes} - {entry.ignored_bytes} = {used}"
            )


def _said(adapter: ModelAdapter, config: Config, names: Names, dtype: str) -> Mapping[str, Form]:
    """What the adapter declares of the checkpoint of a text config."""
    said = described_tensors(adapter, config, names.parameters, STORED_DTYPES[dtype])
    if said is None:
        does_not_apply(_NOTHING)
    return said


def same_forms(said: Mapping[str, Form], held: Mapping[str, Form], what: str) -> None:
    """Raises AssertionError at the first tensor that differs."""
    for name in sorted(said.keys() | held.keys()):
        one, other = said.get(name), held.get(name)
        if one is None or other is None or (one[0], tuple(one[1])) != other:
            raise AssertionError(
                f"{what}, tensor {name}: expected {_form(other)}, got {_form(one)}"
            )


def _form(form: Form | None) -> str:
    return "none such" if form is None else f"{form[0]} {list(form[1])}"
