"""`ollm run`: what it generates, tells, keeps and refuses."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from one_line import is_one_line_error

RUN_FIELDS = {
    "text", "token_ids", "num_prompt_tokens", "num_cached_tokens", "num_new_tokens",
    "prefill_seconds", "decode_tokens_per_second", "device_peak_bytes", "host_peak_bytes",
    "weight_bytes_read", "kv_bytes_read", "weight_passes", "times_short",
}  # fmt: skip


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
