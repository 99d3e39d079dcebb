"""What `ollm run` says of a run that does not fit: numbers that do."""

from __future__ import annotations

import re

import pytest

from ollm_core.cli.main import main


def run(capsys, directory, num_tokens, memory):
    """(exit code, stderr) of a run whose prompt has so many tokens."""
    prompt = " ".join(str(3 + i % 190) for i in range(num_tokens))
    fixed = ["--prompt", prompt, "--raw", "--device", "cpu", "--kv", "host"]
    with pytest.raises(SystemExit) as end:
        main(["run", str(directory), *fixed, "--max-new-tokens", "9", "--host-memory", memory])
    return end.value.code or 0, capsys.readouterr().err


def test_a_refusal_names_the_least_memory_and_the_longest_context(capsys, chat):
    """Both do."""
    code, err = run(capsys, chat, 1500, "500kB")
    assert code == 3
    error, hint = err.splitlines()[-2:]
    assert error.startswith("error: host memory: need ")
    least, longest = re.fullmatch(
        r"hint: the prompt has 1500 tokens: allow --host-memory (\w+), "
        r"or a context of at most (\d+) tokens",
        hint,
    ).groups()
    assert run(capsys, chat, 1500, least)[0] == 0
    assert run(capsys, chat, int(longest) - 9, "500kB")[0] == 0


def test_a_prompt_past_the_positions_is_told_before_memory(capsys, chat):
    """More memory would not help."""
    code, err = run(capsys, chat, 4100, "500kB")
    assert code == 2, err
    assert "4100 tokens are past the model's 4096 positions" in err
