"""Every error that is raised on purpose, its exit code, and its one line."""

from __future__ import annotations

import re

from ollm_core import errors
from ollm_core.errors import DoesNotFitError, InputError, OllmError, one_line


def every(kind):
    for child in kind.__subclasses__():
        if child.__module__ == errors.__name__:
            yield child
            yield from every(child)


def test_the_tree_of_the_docstring_is_the_tree():
    """Each class, in its place, with the exit code that the command line gives it."""
    lines = re.findall(r"^ {4}([ │├└─]*)(\w+)\s+(\d?)", errors.__doc__, re.MULTILINE)
    told = {name: (len(prefix) // 4, code) for prefix, name, code in lines}
    kinds = [OllmError, *every(OllmError)]
    assert told.keys() == {kind.__name__ for kind in kinds}
    for kind in kinds:
        depth, code = told[kind.__name__]
        assert len(kind.__mro__) - len(OllmError.__mro__) == depth
        assert not code or int(code) == kind.exit_code


def test_one_line_of_any_error():
    """Ours speak for themselves, those of others with their type."""
    assert one_line(InputError("a\nb", hint="c")) == "a b. hint: c"
    assert one_line(ValueError("a\n b")) == "ValueError: a b"
    assert one_line(KeyboardInterrupt()) == "KeyboardInterrupt"


def test_a_refusal_can_be_read_by_programs():
    """Which memory, and the limit that would do."""
    refused = DoesNotFitError("x", hint="y", memory="device memory", needed_bytes=7)
    assert (refused.memory, refused.needed_bytes, refused.exit_code) == ("device memory", 7, 3)
