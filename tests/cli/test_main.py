"""The command line: what goes to stdout, what to stderr, and the exit codes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ollm_core.cli.main import main

TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
RUN_FIELDS = {
    "text", "token_ids", "num_prompt_tokens", "num_cached_tokens", "num_new_tokens",
    "prefill_seconds", "decode_tokens_per_second", "device_peak_bytes", "host_peak_bytes",
    "weight_bytes_read", "kv_bytes_read", "weight_passes", "times_short",
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny_chat(tmp_path_factory) -> Path:
    """A random Llama of two layers with a byte-level tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    directory = tmp_path_factory.mktemp("models") / "tiny"
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(["<s>", "</s>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE
    ).save_pretrained(directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        bos_token_id=0, eos_token_id=1, initializer_range=0.5, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.generation_config.update(do_sample=True, temperature=0.6, top_p=0.9)  # as Llama 3 has
    model.save_pretrained(directory)
    return directory


@pytest.fixture
def ollm(capsys):
    """Runs a command line in this process: (exit code, stdout, stderr)."""

    def run(*arguments) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit_info:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return int(exit_info.value.code or 0), captured.out, captured.err

    return run


def is_one_line_error(stderr: str) -> bool:
    lines = stderr.splitlines()
    return (
        1 <= len(lines) <= 2
        and lines[0].startswith("error: ")
        and all(line.startswith("hint: ") for line in lines[1:])
    )


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


def test_list_models(ollm, tiny_chat):
    """Every model of the catalog has a line, and the same fields as JSON."""
    code, out, err = ollm("list-models", "--json", "--models-dir", tiny_chat.parent)
    assert (code, err) == (0, "")
    models = {model["id"]: model for model in json.loads(out)["models"]}
    assert models["smollm2-135M"]["adapter"] == "llama"
    assert models["smollm2-135M"]["distribution"] == "ollm-adapter-llama"
    assert not models["llama3-8B-chat"]["on_disk"]
    assert models[tiny_chat.name]["on_disk"]
    _, out, _ = ollm("list-models", "--models-dir", tiny_chat.parent)
    assert [line.split()[0] for line in out.split("\n\n")[0].splitlines()] == ["MODEL", *models]


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


def greedy_tokens(directory: Path, text: str, num_tokens: int) -> list[int]:
    """Greedy tokens of transformers itself, in float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    inputs = tokenizer(text, return_tensors="pt")
    output = model.generate(
        **inputs, max_new_tokens=num_tokens, do_sample=False, temperature=None, top_p=None
    )
    return output[0, inputs.input_ids.shape[1] :].tolist()


def test_run(ollm, tiny_chat, tmp_path):
    """Greedy by default: the tokens of transformers, and the same text on stdout as in JSON."""
    document = tmp_path / "doc.txt"
    document.write_text("Ünïcode document\n")
    arguments = [
        "run", tiny_chat, "--file", document, "--prompt", "why?", "--max-new-tokens", 12,
        "--device", "cpu", "--dtype", "float32",
    ]  # fmt: skip
    code, out, err = ollm(*arguments, "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert set(report) == RUN_FIELDS
    text = "[user]Ünïcode document\n\nwhy?[assistant]"
    assert report["token_ids"] == greedy_tokens(tiny_chat, text, 12)
    assert report["num_prompt_tokens"] == len(text.encode())
    assert report["num_new_tokens"] == len(report["token_ids"])
    assert report["weight_passes"] == report["num_new_tokens"]
    code, out, err = ollm(*arguments)
    assert code == 0
    assert out == report["text"] + "\n"
    for words in ("model", "device memory", "weights read", "prefill", "decode", "KV cache"):
        assert words in err


EFFORT = (
    "Reasoning: {{ reasoning_effort if reasoning_effort is defined else 'medium' }}. "
    "{% for m in messages %}{{ m['content'] }}{% endfor %}"
)


def test_run_reasoning_effort(ollm, tiny_chat, tmp_path):
    """The effort reaches a chat template that asks for it; another template is not given one."""
    directory = tmp_path / "thinks"
    shutil.copytree(tiny_chat, directory)
    (directory / "chat_template.jinja").write_text(EFFORT)
    arguments = ["--prompt", "why?", "--max-new-tokens", 5, "--device", "cpu", "--json"]
    code, out, err = ollm("run", tiny_chat, *arguments, "--reasoning-effort", "low")
    assert (code, out) == (2, "")
    assert "has no reasoning effort" in err
    assert is_one_line_error(err)
    for effort in (None, "low", "high"):
        given = ["--reasoning-effort", effort] if effort else []
        code, out, _ = ollm("run", directory, *arguments, *given)
        assert code == 0
        text = f"Reasoning: {effort or 'medium'}. why?"
        assert json.loads(out)["token_ids"] == greedy_tokens(directory, text, 5)


def test_run_stops_at_any_end(ollm, tiny_chat, tmp_path):
    """Every token that generation_config.json calls an end is one."""
    arguments = ["--prompt", "why?", "--max-new-tokens", 12, "--device", "cpu", "--json"]
    code, out, _ = ollm("run", tiny_chat, *arguments)
    tokens = json.loads(out)["token_ids"]
    place = max(i for i, token in enumerate(tokens[:11]) if token not in tokens[:i])
    assert place > 0
    directory = tmp_path / "ends"
    shutil.copytree(tiny_chat, directory)
    (directory / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [1, tokens[place]], "pad_token_id": 0})
    )
    code, out, _ = ollm("run", directory, *arguments)
    assert code == 0
    assert json.loads(out)["token_ids"] == tokens[: place + 1]


def test_run_raw_from_stdin(tiny_chat):
    """Text from a pipe is continued as it is, and no warning of a library gets out."""
    command = [sys.executable, "-m", "ollm_core.cli", "run", str(tiny_chat), "--raw", "--json"]
    command += ["--max-new-tokens", "3", "--dtype", "float32", "--device", "cpu"]
    done = subprocess.run(command, input="abc", capture_output=True, text=True, check=True)
    assert done.stderr == ""
    report = json.loads(done.stdout)
    assert report["num_prompt_tokens"] == 3
    assert report["token_ids"] == greedy_tokens(tiny_chat, "abc", 3)


def test_run_samples_by_seed(ollm, tiny_chat):
    """The same seed gives the same text, another one another text."""
    arguments = [
        "run",
        tiny_chat,
        "--prompt",
        "a",
        "--json",
        "--device",
        "cpu",
        "--max-new-tokens",
        8,
    ]
    arguments += ["--temperature", "2", "--top-k", "50", "--seed"]
    first, again, other = (json.loads(ollm(*arguments, seed)[1])["token_ids"] for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_run_profile(ollm, tiny_chat, tmp_path):
    """A table on stderr and a trace in a file; a file that cannot be is refused first."""
    arguments = ["run", tiny_chat, "--prompt", "abc", "--max-new-tokens", "3", "--json"]
    trace = tmp_path / "trace.json"
    code, out, err = ollm(*arguments, "--profile", trace)
    assert code == 0
    assert json.loads(out)["num_new_tokens"] == 3
    assert "the rest of a pass" in err
    assert {event["ph"] for event in json.loads(trace.read_text())["traceEvents"]} == {"M", "X"}
    code, out, err = ollm(*arguments, "--profile", tmp_path / "no" / "trace.json")
    assert (code, out) == (2, "")
    assert is_one_line_error(err)


def test_run_refuses(ollm, tiny_chat, tmp_path):
    """A budget that is too small is code 3, an unknown device and a taken KV directory are 2."""
    arguments = ["run", tiny_chat, "--prompt", "hi", "--device", "cpu"]
    code, out, err = ollm(*arguments, "--device-memory", "1kB")
    assert (code, out) == (3, "")
    assert is_one_line_error(err)
    code, out, err = ollm("run", tiny_chat, "--prompt", "hi", "--device", "abacus")
    assert (code, out) == (2, "")
    assert is_one_line_error(err)
    taken = tmp_path / "file"
    taken.touch()
    code, out, err = ollm(*arguments, "--kv", "disk", "--kv-dir", taken)
    assert (code, out) == (2, "")
    assert is_one_line_error(err)


def test_interrupted_run_leaves_nothing(tiny_chat, tmp_path):
    """Ctrl-C in the middle of an answer ends cleanly; what is not to be kept goes along."""
    kv_dir = tmp_path / "kv"
    command = [sys.executable, "-m", "ollm_core.cli", "run", str(tiny_chat), "--prompt", "hi"]
    command += ["--kv-dir", str(kv_dir), "--no-keep-kv", "--max-new-tokens", "200"]
    command += ["--temperature", "5", "--device", "cpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode in (130, 0)  # 0: it was quicker than the signal
    assert b"Traceback" not in err
    assert not kv_dir.exists() or not list(kv_dir.iterdir())


def test_broken_pipe_is_quiet(tiny_chat):
    """A reader that goes away, as `head` does, is no reason for a traceback."""
    command = [sys.executable, "-m", "ollm_core.cli", "run", str(tiny_chat), "--prompt", "hi"]
    command += ["--max-new-tokens", "100", "--temperature", "5", "--device", "cpu"]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert b"Traceback" not in done.stderr
    assert b"Exception" not in done.stderr


@pytest.mark.slow
def test_a_real_model_answers_about_a_document(ollm, smollm2, tmp_path):
    """The demo in small: SmolLM2 below its own size in memory, with KV on disk."""
    document = tmp_path / "doc.txt"
    document.write_text("The meeting is on Friday at the office of Ms Brown in Bergen.")
    code, out, err = ollm(
        "run", smollm2, "--file", document, "--prompt", "In which city is the meeting?",
        "--max-new-tokens", 24, "--device", "cpu", "--device-memory", "128MB",
        "--kv", "disk", "--kv-dir", tmp_path / "kv", "--json",
    )  # fmt: skip
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert "Bergen" in report["text"]
    assert report["device_peak_bytes"] <= 128_000_000


def test_kept_kv(ollm, tiny_chat, tmp_path):
    """The second run finds the first one's prompt; `cache` shows, verifies and removes it."""
    kv_dir = tmp_path / "kv"
    (tmp_path / "kv").mkdir()
    (kv_dir / "mine.txt").write_text("keep")
    arguments = ["run", tiny_chat, "--raw", "--max-new-tokens", 3, "--json", "--device", "cpu"]
    first = [*arguments, "--prompt", "a document of some length", "--kv-dir", kv_dir]
    answers = [json.loads(ollm(*first)[1]) for _ in range(2)]
    assert answers[0]["num_cached_tokens"] == 0
    assert answers[1]["num_cached_tokens"] == answers[1]["num_prompt_tokens"] - 1
    assert answers[0]["token_ids"] == answers[1]["token_ids"]
    assert json.loads(ollm(*first, "--no-keep-kv")[1])["num_cached_tokens"] == 0
    ollm(*arguments, "--prompt", "something else", "--kv-dir", kv_dir)
    where = ["--kv-dir", kv_dir, "--json"]
    shown = json.loads(ollm("cache", "list", *where)[1])["prefixes"]
    assert [one["num_tokens"] for one in shown] == [27, 16]
    assert ollm("cache", "verify", *where)[0] == 0
    assert shown[0]["id"][:12] in ollm("cache", "list", "--kv-dir", kv_dir)[1]
    (path,) = kv_dir.glob("*/layer-00001.kv")
    data = bytearray(path.read_bytes())
    data[4096] ^= 1
    path.write_bytes(data)
    code, out, _ = ollm("cache", "verify", *where)
    assert code == 1
    assert [bool(one["wrong"]) for one in json.loads(out)["prefixes"]].count(True) == 1
    assert ollm("cache", "remove", "zz", *where)[0] == 2
    assert ollm("cache", "remove", *where)[0] == 2
    code, out, _ = ollm("cache", "remove", shown[0]["id"][:6], *where)
    assert (code, len(json.loads(out)["removed"])) == (0, 1)
    assert len(json.loads(ollm("cache", "list", *where)[1])["prefixes"]) == 1
    assert ollm("cache", "remove", "--all", *where)[0] == 0
    assert [path.name for path in kv_dir.iterdir()] == ["mine.txt"]


def test_run_by_repository(ollm, tiny_chat, tmp_path):
    """A model of the hub is named by its repository, once it is on disk; before, the line says how
    to get it.
    """
    shutil.copytree(tiny_chat, tmp_path / "root/someone/tiny")
    options = ["--raw", "--prompt", "Hi", "--max-new-tokens", "2", "--device", "cpu"]
    options += ["--models-dir", tmp_path / "root"]
    code, out, _ = ollm("run", "someone/tiny", *options, "--json")
    assert code == 0
    assert json.loads(out)["num_new_tokens"] == 2
    code, out, err = ollm("run", "someone/other", *options)
    assert (code, out) == (2, "")
    assert err.splitlines()[1].startswith("hint: ollm pull someone/other, if it is a repository")
