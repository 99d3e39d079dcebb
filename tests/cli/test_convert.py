"""`ollm convert`."""

from __future__ import annotations

import json

import pytest
import torch


def test_the_verb(make_llama, tmp_path, capsys):
    """`ollm convert`: an object on stdout alone, a line for people, exit codes."""
    from ollm_core.cli.main import main

    original = make_llama(torch.bfloat16, hidden_size=256, intermediate_size=512)
    capsys.readouterr()  # transformers' bars

    def ollm_says(*arguments):
        with pytest.raises(SystemExit) as end:
            main(["convert", *map(str, arguments)])
        return end.value.code, *capsys.readouterr()

    code, out, err = ollm_says(original, "--out", tmp_path / "out", "--json")
    found = json.loads(out)
    assert (code, err) == (0, "")
    assert found["saved_bytes"] == found["original_bytes"] - found["stored_bytes"] > 0
    assert found["path"] == str(tmp_path / "out")
    code, out, err = ollm_says(original, "--out", tmp_path / "out")
    assert (code, out) == (0, f"{tmp_path / 'out'}\n")
    assert "all checked bit for bit" in err
    assert "1 of 1 files were there" in err
    assert ollm_says(original, "--out", original)[0] == 2
    assert ollm_says("no-such-model", "--out", tmp_path / "x")[0] == 4
    (original / "config.json").write_text('{"model_type": "none"}')
    assert ollm_says(original, "--out", tmp_path / "x")[0] == 4
