"""Files that anybody may have written, damaged at random: the tokens of transformers on the same
files, or a typed error of one line, in bounded time and memory. A fixed number of examples.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import resource
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import ollm
from ollm_adapter_qwen3_next import Qwen3NextAdapter
from ollm_conformance.models import random_model
from ollm_core import OllmError
from ollm_core.cli.main import main

SECONDS = 20
"""Far more than any example takes; one that hangs is broken off."""
MORE_BYTES = 3 << 30
"""Address space beyond what the process has when an example begins."""
NUM_NEW = 3
PROMPT = torch.arange(5, 45)[None]
LONG_PROMPT = (torch.arange(600) % 150 + 5)[None]


def fuzz(examples: int) -> Any:
    """So many examples, the same each time."""
    return settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.explicit, Phase.generate],  # to shrink one takes minutes
        suppress_health_check=list(HealthCheck),
    )


HOSTILE = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 1, 2, 3, 1 << 31, 1 << 63, 10**30, -0.5, 1e308]),
    st.sampled_from(["", "x", "../../etc/passwd", "llama", "\x00", "é" * 300, "__import__('os')"]),
    st.sampled_from([[], {}, [[]], [0, 1], {"a": {}}, {"rope_type": "yarn"}, [2] * 1000]),
)
EDITS = st.lists(
    st.tuples(st.integers(0, 1 << 16), st.sampled_from(["flip", "cut", "double", "zero"])),
    min_size=1,
    max_size=4,
)


def damage(raw: bytes, edits: list[tuple[int, str]], limit: int | None = None) -> bytes:
    """`raw` with some bytes flipped, cut out, doubled or zeroed, in its first `limit` bytes."""
    data = bytearray(raw)
    for place, kind in edits:
        if not data:
            break
        at = place % min(len(data), limit or len(data))
        part = slice(at, at + 1 + place % 7)
        if kind == "flip":
            data[at] ^= 1 << place % 8
        elif kind == "cut":
            del data[part]
        elif kind == "double":
            data[part] = data[part] * 2
        else:
            data[part] = bytes(len(data[part]))
    return bytes(data)


@st.composite
def changed(draw: Any, value: Any) -> Any:
    """A JSON value with one of its parts replaced, removed, or named otherwise."""
    value = copy.deepcopy(value)
    holder, keys = value, list(value)
    while True:
        key = draw(st.sampled_from(keys)) if keys else "x"
        inner = holder.get(key) if isinstance(holder, dict) else holder[key]
        if not isinstance(inner, (dict, list)) or not inner or draw(st.booleans()):
            break
        holder = inner
        keys = list(inner) if isinstance(inner, dict) else list(range(len(inner)))
    if isinstance(holder, dict) and draw(st.integers(0, 4)) == 0:
        holder.pop(key, None)
    else:
        holder[key] = draw(HOSTILE)
    return value


class TookTooLong(BaseException):
    """Raised in an example that hangs; nothing catches it."""


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Breaks off what takes too long, and refuses memory beyond a bound."""

    def give_up(*_: object) -> None:
        raise TookTooLong

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = signal.signal(signal.SIGALRM, give_up)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MORE_BYTES, hard))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def ours(directory: Path, prompt: torch.Tensor = PROMPT, **options: Any) -> list[int] | None:
    """Greedy tokens, or None after a typed error of one line."""
    options = {"device_memory": "64MB", "host_memory": "64MB", "kv": "host"} | options
    refused: OllmError | None = None
    with bounded():
        try:
            with ollm.load(directory, device="cpu", **options) as model:
                return generate(model, prompt)
        except OllmError as error:
            refused = error
    assert "\n" not in str(refused)
    assert refused.message
    return None


def theirs(directory: Path) -> list[int] | None:
    """Greedy tokens of un-offloaded transformers on the same files, or None where it fails."""
    try:
        model = AutoModelForCausalLM.from_pretrained(
            directory, attn_implementation="eager", trust_remote_code=False
        )
        return generate(model, PROMPT)
    except Exception:  # noqa: BLE001 (it raises anything)
        return None


def generate(model: Any, prompt: torch.Tensor) -> list[int]:
    options = {"do_sample": False, "max_new_tokens": NUM_NEW, "min_new_tokens": NUM_NEW}
    output = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    return output[0, prompt.shape[1] :].tolist()


def right_or_refused(directory: Path, undamaged: list[int] | None) -> None:
    """What runs gives the tokens that transformers gives; where that fails, those of before."""
    if (found := ours(directory)) is not None:
        assert found == (theirs(directory) or undamaged)


@pytest.fixture
def sharded(make_llama: Any) -> Path:
    """A tiny float32 Llama in several files with an index."""
    return make_llama(shard="200KB", num_hidden_layers=2, vocab_size=160)


def test_index(sharded: Path) -> None:
    """model.safetensors.index.json."""
    index = sharded / "model.safetensors.index.json"
    good, right = json.loads(index.read_bytes()), ours(sharded)

    @fuzz(25)
    @given(changed(good), EDITS, st.booleans())
    def each(value: Any, edits: list[tuple[int, str]], raw: bool) -> None:
        text = json.dumps(good if raw else value).encode()
        index.write_bytes(damage(text, edits) if raw else text)
        right_or_refused(sharded, right)

    each()


def test_header(sharded: Path) -> None:
    """The head of a safetensors file, its length and its JSON."""
    path = sorted(sharded.glob("*.safetensors"))[0]
    good, right = path.read_bytes(), ours(sharded)
    length = 8 + int.from_bytes(good[:8], "little")

    @fuzz(30)
    @given(changed(json.loads(good[8:length])), EDITS, st.booleans())
    def each(value: Any, edits: list[tuple[int, str]], raw: bool) -> None:
        if raw:
            path.write_bytes(damage(good, edits, length))
        else:
            header = json.dumps(value).encode()
            path.write_bytes(len(header).to_bytes(8, "little") + header + good[length:])
        right_or_refused(sharded, right)

    each()


def test_config(sharded: Path) -> None:
    """config.json."""
    path = sharded / "config.json"
    good, right = json.loads(path.read_bytes()), ours(sharded)

    @fuzz(50)
    @given(changed(good), EDITS, st.integers(0, 4))
    def each(value: Any, edits: list[tuple[int, str]], raw: int) -> None:
        text = json.dumps(value if raw else good).encode()
        path.write_bytes(text if raw else damage(text, edits))
        right_or_refused(sharded, right)

    each()


GENERATION = {
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "pad_token_id": 0,
    "do_sample": True,
    "temperature": 0.6,
    "top_p": 0.9,
    "max_length": 4096,
    "stop_strings": ["x"],
    "suppress_tokens": [3],
    "transformers_version": "5.23.0",
}


def run(directory: Path, *options: str) -> tuple[int, str, str]:
    """`ollm run` in this process: exit code, stdout, stderr."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    arguments = ["run", str(directory), "--device", "cpu", "--max-new-tokens", str(NUM_NEW)]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), bounded():
        try:
            main([*arguments, "--prompt", "7 8 9", "--kv", "host", *options])
        except SystemExit as stop:
            code = int(stop.code or 0)
    return code, out.buffer.getvalue().decode(), err.buffer.getvalue().decode()


def test_generation_config(chat: Path) -> None:
    """generation_config.json: `ollm run` ends with an answer, or with one line and exit code 2."""
    path = chat / "generation_config.json"

    @fuzz(30)
    @given(changed(GENERATION), EDITS, st.integers(0, 4))
    def each(value: Any, edits: list[tuple[int, str]], raw: int) -> None:
        text = json.dumps(value if raw else GENERATION).encode()
        path.write_bytes(text if raw else damage(text, edits))
        code, out, err = run(chat, "--json")
        assert code in (0, 2), err
        if code == 0:
            assert json.loads(out)["num_new_tokens"] <= NUM_NEW
        else:
            assert "generation_config.json" in err
            assert "Traceback" not in err

    each()


TEMPLATE = (
    "{% for message in messages %}{{ message.role }} {{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %} 4 {% endif %}"
)
PARTS = [
    "{{ 'a' * 10**10 }}",
    "{% for a in range(99999) %}{% for b in range(99999) %}1{% endfor %}{% endfor %}",
    "{{ messages.__class__.__mro__ }}",
    "{{ raise_exception('no') }}",
    "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ cycler.__init__.__globals__.os.system('touch HACKED') }}",
    "{% include '/etc/passwd' %}",
    "{{ '%999999999d' % 1 }}",
    "{{ 10 ** 10 ** 10 }}",
]


def test_template(chat: Path) -> None:
    """chat_template.jinja: an answer, or one line that names the template, and exit code 2."""
    path = chat / "chat_template.jinja"

    @fuzz(24)
    @given(EDITS, st.sampled_from(["", *PARTS]), st.booleans())
    def each(edits: list[tuple[int, str]], part: str, raw: bool) -> None:
        text = damage(TEMPLATE.encode(), edits) if raw else TEMPLATE.encode()
        path.write_bytes(text + part.encode())
        code, _, err = run(chat, "--json")
        assert code in (0, 2), err
        assert "Traceback" not in err
        if code:
            assert "template" in err or "prompt" in err

    each()
    assert not list(Path().glob("HACKED"))


def kept_then_damaged(directory: Path, parent: Path, pattern: str, examples: int) -> None:
    """A run keeps its KV; the next finds it with a file of that `pattern` damaged, and is right."""
    kept, again = parent / "kept", parent / "again"
    options: dict[str, Any] = {"kv": "disk", "keep_kv": True}
    right = ours(directory, LONG_PROMPT, kv_dir=kept, **options)
    files = [path.relative_to(kept) for path in sorted(kept.rglob(pattern)) if path.is_file()]
    assert right is not None
    assert files

    @fuzz(examples)
    @given(st.sampled_from(files), EDITS, st.sampled_from([256, 4096, None]))
    def each(file: Path, edits: list[tuple[int, str]], limit: int | None) -> None:
        shutil.rmtree(again, ignore_errors=True)
        shutil.copytree(kept, again)
        path = again / file
        path.write_bytes(damage(path.read_bytes(), edits, limit))
        assert ours(directory, LONG_PROMPT, kv_dir=again, **options) == right

    each()


def test_kept_kv(sharded: Path, tmp_path: Path) -> None:
    """The journal and the layers of a KV directory: the right tokens, whatever became of it."""
    kept_then_damaged(sharded, tmp_path, "*", 30)


def test_kept_states(tmp_path: Path) -> None:
    """The same of recurrent states."""
    random_model(Qwen3NextAdapter().tiny_config()).save_pretrained(tmp_path / "model")
    kept_then_damaged(tmp_path / "model", tmp_path, "*.state", 8)
