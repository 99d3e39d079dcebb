"""The command line: what goes to stdout, what to stderr, and the exit codes."""

import json
import subprocess
import sys
import time

import pytest
from one_line import is_one_line_error


@pytest.mark.parametrize("arguments", [["--help"], ["list-models"], ["plugins", "--json"]])
def test_no_torch(arguments):
    """Looking around loads neither torch nor transformers, nor the hub's client."""
    code = (
        "import sys\nfrom ollm_core.cli.main import main\n"
        f"try: main({arguments})\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "print(sorted({'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)))"
    )
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    print(f"{arguments}: {time.monotonic() - start:.2f} s")  # noqa: T201
    assert done.stdout.splitlines()[-1] == "[]"


def test_plugins(ollm):
    """The installed plugins are shown with their version, API and state."""
    code, out, _ = ollm("plugins", "--json")
    assert code == 0
    (llama,) = [
        plugin
        for plugin in json.loads(out)["plugins"]
        if plugin["distribution"] == "ollm-adapter-llama"
    ]
    assert [(one["name"], one["adapter_api"]) for one in llama["adapters"]] == [("llama", "1.0")]
    code, out, _ = ollm("plugins")
    assert code == 0
    assert "ollm-adapter-llama" in out


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["walk"], 2, "walk"),
        (["run"], 2, "MODEL"),
        (["run", "x", "--kv", "tape"], 2, "tape"),
        (["run", "x", "--top-p", "0.5"], 2, "--temperature"),
        (["run", "x", "--raw", "--system", "s"], 2, "--system"),
        (["run", "x", "--raw", "--reasoning-effort", "low"], 2, "--reasoning-effort"),
        (["run", "x", "--prompt", " "], 2, "empty"),
        (["run", "x", "--file", "/nowhere/doc"], 2, "/nowhere/doc"),
        (["run", "x", "--prompt", "hi", "--draft", "tea-leaves"], 2, "lookup"),
        (["run", "x", "--prompt", "hi", "--num-draft-tokens", "4"], 2, "--draft"),
        (["run", "x", "--prompt", "hi", "--reader", "fast"], 2, "mmap"),
        (["run", "x/y", "--prompt", "hi"], 2, "no directory"),
        (["run", "no-such-model", "--prompt", "hi"], 4, "no-such-model"),
        (["run", "llama3-8B-chat", "--prompt", "hi"], 2, "ollm pull llama3-8B-chat"),
        (["pull", "no-such-model"], 4, "no-such-model"),
        (["import", "/nowhere/x.gguf"], 2, "/nowhere/x.gguf"),
        (["import", __file__], 2, "not a GGUF"),
    ],
)
@pytest.mark.parametrize("as_json", [False, True])
def test_errors(ollm, tmp_path, monkeypatch, arguments, code, words, as_json):
    """Each mistake is one line on stderr with its exit code, and stdout stays empty."""
    monkeypatch.setenv("OLLM_MODELS", str(tmp_path))
    got, out, err = ollm(*arguments, *(["--json"] if as_json and arguments != ["walk"] else []))
    assert (got, out) == (code, "")
    assert is_one_line_error(err)
    assert words in err


def test_debug_shows_the_traceback(ollm):
    """With --debug an error is followed by where it happened, without it never."""
    arguments = ["run", "x/y", "--prompt", "hi"]
    assert "Traceback" not in ollm(*arguments)[2]
    assert "Traceback" in ollm(*arguments, "--debug")[2]
    assert "Traceback" in ollm("--debug", *arguments)[2]


def test_unexpected_errors_are_one_line_too(ollm, monkeypatch):
    """What nobody foresaw is still one line, and names --debug."""

    def fail(*_):
        raise ZeroDivisionError("by zero\nthen more")

    monkeypatch.setattr("ollm_core.cli.run._user_text", fail)
    code, out, err = ollm("run", "x", "--prompt", "hi")
    assert (code, out) == (1, "")
    assert is_one_line_error(err)
    assert "--debug" in err


def test_interrupt(ollm, monkeypatch):
    """Ctrl-C ends with the code that shells use for it."""

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("ollm_core.cli.run._user_text", interrupt)
    code, out, err = ollm("run", "x", "--prompt", "hi")
    assert (code, out) == (130, "")
    assert "Traceback" not in err


def test_verbs_are_told_in_full(ollm):
    """`ollm --help` cuts no description of a verb, at 80 columns."""
    code, out, _ = ollm("--help")
    verbs = out.split("Commands:\n")[1]
    assert code == 0
    assert "list-models" in verbs
    assert "..." not in verbs
