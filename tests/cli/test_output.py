"""What the verbs print: tables, objects, and errors of one line."""

from __future__ import annotations

import json
import logging
import warnings

from ollm_core.cli.output import print_error, print_json, print_table, quiet


def test_errors_are_one_line_each(capsys):
    """Whatever line breaks a message has."""
    print_error("a\nb  c", "d\te\n")
    assert capsys.readouterr() == ("", "error: a b c\nhint: d e\n")


def test_a_table_has_straight_columns(capsys):
    """And no blanks at the ends of lines."""
    print_table([["ID", "SIZE", ""], ["model", "7", "x"], ["m", "1000", ""]])
    assert capsys.readouterr().out == "ID     SIZE\nmodel  7     x\nm      1000\n"


def test_json_is_one_line_of_any_alphabet(capsys):
    """Text is not escaped beyond what JSON needs."""
    print_json({"text": "Ü\n語"})
    out = capsys.readouterr().out
    assert out == '{"text": "Ü\\n語"}\n'
    assert json.loads(out) == {"text": "Ü\n語"}


def test_libraries_are_quiet_inside_and_heard_after(capsys, caplog):
    """Warnings and log lines below an error."""
    log = logging.getLogger("some.library")
    with quiet():
        warnings.warn("w", stacklevel=1)
        log.warning("hidden")
        log.error("an error")
    log.warning("heard")
    assert [one.message for one in caplog.records] == ["an error", "heard"]
