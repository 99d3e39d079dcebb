"""What a failure says: in words, with what was expected and what was got."""

from __future__ import annotations

import pytest

from ollm_conformance.compare import refused
from ollm_core import CheckpointError, ConfigError


def test_a_refusal_that_does_not_come_is_told():
    """No error, and an error of another kind, are a sentence each."""
    with pytest.raises(AssertionError) as failed, refused(CheckpointError, "tensor x.bias"):
        pass
    assert str(failed.value) == "tensor x.bias: expected a CheckpointError, got no error"
    with pytest.raises(AssertionError) as failed, refused(OSError, "a file"):
        raise TypeError("no path")
    assert str(failed.value) == "a file: expected an OSError, got TypeError: no path"
    assert isinstance(failed.value.__cause__, TypeError)


def test_a_refusal_must_name_what_it_refuses():
    """The error is kept, and held against what it must say."""
    with refused(ConfigError, "key q") as refusal:
        raise ConfigError("q must be a number", hint="fetch it again")
    refusal.says("q must be")
    refusal.says("fetch it again")
    with pytest.raises(AssertionError, match="key q: expected an error that says 'rope', got: q"):
        refusal.says("rope")


def test_other_failures_pass_through():
    """An assertion speaks for itself; Ctrl-C stops the run."""
    with pytest.raises(AssertionError, match=r"^another$"), refused(ConfigError, "key q"):
        raise AssertionError("another")
    with pytest.raises(KeyboardInterrupt), refused(ConfigError, "key q"):
        raise KeyboardInterrupt
