"""Converted checkpoints: the same bits out of fewer bytes, inside the same accounts; and what a
conversion leaves behind when it is broken off.
"""

from __future__ import annotations

import errno
import fcntl
import gc
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import ollm
from ollm_adapter_llama import LlamaAdapter
from ollm_adapter_qwen3_next import Qwen3NextAdapter
from ollm_conformance.allocated import live_bytes
from ollm_conformance.subject import Subject, greedy
from ollm_core import CheckpointError, DoesNotFitError, InputError, OllmError, UnsupportedError
from ollm_core.checkpoint.safetensors import open_checkpoint
from ollm_core.convert import writer
from ollm_core.convert.compress import convert
from ollm_core.memory.budgets import Budgets
from ollm_core.planning.dry_run import Scenario
from ollm_core.weights.formats import compressed

UP = "model.layers.0.mlp.up_proj.weight"
FAMILIES = {"llama": LlamaAdapter, "qwen3-next": Qwen3NextAdapter}


@pytest.fixture(scope="module")
def subject_of(tmp_path_factory):
    """A family's tiny model, and the directory of it converted; made once for each dtype."""
    subjects = {}

    def make(family, dtype="bfloat16"):
        if family not in subjects:
            subjects[family] = Subject(FAMILIES[family](), tmp_path_factory.mktemp(family))
        subject = subjects[family]
        original = subject.tiny(dtype)
        out = original.with_name(f"{original.name}-compressed")
        if not out.exists():
            convert(original, out, min_bytes=1024, registry=subject.registry)
        return subject, original, out

    return make


@pytest.mark.parametrize(
    ("family", "stored", "dtype"),
    [
        ("llama", "bfloat16", "bfloat16"),
        ("llama", "bfloat16", "float32"),
        ("llama", "float16", "float16"),
        ("qwen3-next", "bfloat16", "bfloat16"),
    ],
)
def test_logits_are_those_of_the_original(subject_of, family, stored, dtype):
    """Streamed in the least memory and resident: the bits and tokens of un-offloaded transformers
    on the original. A byte less is refused; a plan says what a run holds, to the byte.
    """
    subject, original, out = subject_of(family, stored)
    prompt = subject.prompt(120)
    tokens, logits = subject.reference(dtype, original).greedy(prompt, 3)
    options = {"dtype": dtype, "kv": "device"}

    def work(model):
        for ids in (prompt, prompt[:1]):
            model(input_ids=ids[None], logits_to_keep=1)

    least = subject.least_memory(work, out, **options)
    with (
        pytest.raises(DoesNotFitError),
        subject.open(out, device_memory=least - 1, **options) as model,
    ):
        work(model)
    total = open_checkpoint(out).total_bytes
    for device_memory in (least + 200_000, 1 << 30):
        with subject.open(out, device_memory=device_memory, **options) as model:
            found_tokens, found = greedy(model, prompt, 3)
            stats = model.stats
        assert found_tokens == tokens
        assert torch.equal(found, logits.float())
        assert stats.device_peak_bytes <= device_memory
        assert stats.weight_bytes == total < open_checkpoint(original).total_bytes
    assert stats.resident_bytes > total or family == "qwen3-next"  # kept decoded
    if dtype == stored:
        scenario = Scenario(122, 2, 1, "device", "exact", 96)
        dry_run = subject.dry_run(out)
        needed = dry_run.least(scenario, Budgets(1, 1))
        plan = dry_run.run(needed, scenario)
        with subject.open(
            out, device_memory=needed.device, host_memory=needed.host, kv="device"
        ) as model:
            greedy(model, prompt, 2)
            assert plan.device_peak.device_bytes == model.stats.device_peak_bytes


@pytest.mark.parametrize("resident", [False, True])
def test_no_more_is_allocated_than_accounted(subject_of, resident):
    """Tensors that are alive while a layer's parameters are in use: what is kept is kept decoded,
    without the bytes that it was read into.
    """
    subject, _, out = subject_of("llama")
    prompt = subject.prompt(50)[None]
    gc.collect()
    before = live_bytes()
    memory = 1 << 30 if resident else "3MB"
    with subject.open(out, device_memory=memory, kv="device") as model:
        model(input_ids=prompt, logits_to_keep=1)
        with model.weights.acquire(0):
            gc.collect()
            held = live_bytes() - before
        accounted = model.stats.device_peak_bytes
        finished = sum(unit.copied_bytes(torch.bfloat16) for unit in model.weights.units)
    assert held <= accounted
    if resident:
        assert finished < held < finished + open_checkpoint(out).total_bytes / 2


def test_experts_are_compressed_each(subject_of):
    """Those of a mixture, tensor by tensor; what is read by row or in slices is not."""
    _, original, out = subject_of("qwen3-next")
    before, after = (set(open_checkpoint(path).tensors) for path in (original, out))
    gone = before - after
    assert any(".experts.1.down_proj" in name for name in gone)
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= after
    assert after == (before - gone) | {f"{n}.BF16.{p}" for n in gone for p in ("low", "zstd")}


def test_a_plan_reads_the_compressed_bytes(make_llama, tmp_path):
    """`ollm plan` of a converted directory: bytes per token are those that a run reads."""
    original = make_llama(torch.bfloat16, hidden_size=128, intermediate_size=448)
    made = convert(original, tmp_path / "out", min_bytes=1024)
    options = {"device": "cpu", "device_layers": 0, "host_memory": "1MB", "context": 40}
    plans = [
        ollm.plan(path, max_new_tokens=2, device_memory="100MB", **options)
        for path in (original, made.path)
    ]
    assert plans[1].prefill_seconds > plans[0].prefill_seconds  # decoding is not free
    saved = [plan.bytes_read_per_token for plan in plans]
    layers = made.original_bytes - made.stored_bytes
    assert saved[0] - saved[1] == pytest.approx(layers, rel=0.05)
    assert layers > 0.3 * 3 * (3 * 128 * 448 + 3 * 64 * 128)


def test_files_and_what_they_say(make_llama, tmp_path):
    """Shards keep their names, small files their bytes; metadata stays and says more."""
    original = make_llama(torch.bfloat16, shard="100KB")
    for name in ("tokenizer.json", "chat_template.jinja", "LICENSE", "pytorch_model.bin", ".x"):
        (original / name).write_text("{}")
    seen = []
    made = convert(original, tmp_path / "out", min_bytes=1024, on_progress=seen.append)
    assert seen[-1].bytes_done == seen[-1].bytes_total == 2 * made.original_bytes
    assert [step.bytes_done for step in seen] == sorted(step.bytes_done for step in seen)
    before, after = ({p.name for p in path.iterdir()} for path in (original, made.path))
    assert before - after == {"pytorch_model.bin", ".x"}
    assert after <= before
    checkpoint = open_checkpoint(made.path)
    assert made.num_compressed == sum(name.endswith(".zstd") for name in checkpoint.tensors)
    assert made.stored_bytes == checkpoint.total_bytes
    for metadata in checkpoint.metadata.values():
        assert metadata["format"] == "pt"
    assert all(info.offset % 64 == 0 for info in checkpoint.tensors.values())


def stop_at(monkeypatch, name, call, error):
    """Make one call of `packing`'s `name`, as `convert` knows it, fail."""
    real, calls = getattr(writer, name), []

    def wrapped(*arguments):
        calls.append(arguments)
        if len(calls) == call:
            if name == "write_packed":  # half of it was written
                arguments[1].write_bytes(b"half")
            raise error
        return real(*arguments)

    monkeypatch.setattr(f"ollm_core.convert.compress.{name}", wrapped)


@pytest.mark.parametrize("name", ["write_packed", "check_packed"])
def test_a_broken_off_conversion_goes_on(make_llama, tmp_path, monkeypatch, name):
    """What is finished stays and is not done again; until the end nothing can be opened."""
    original, out = make_llama(torch.bfloat16, shard="100KB"), tmp_path / "out"
    num_files = len(open_checkpoint(original).files)
    with monkeypatch.context() as patch:
        stop_at(patch, name, 3, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            convert(original, out, min_bytes=1024)
    left = sorted(path.name for path in out.iterdir())
    assert len(left) == 2
    with pytest.raises(OllmError, match=r"config\.json: no such file"):
        ollm.load(out, device="cpu")
    states = [(out / name).stat().st_mtime_ns for name in left]
    (out / f".{left[0][:-1]}x.partial").touch()
    with pytest.raises(InputError, match=r"holds .*partial'"):
        convert(original, out, min_bytes=1024)
    (out / f".{left[0][:-1]}x.partial").unlink()
    (out / ".model-00003-of-99999.safetensors.partial").unlink(missing_ok=True)
    names = sorted(path.name for path in open_checkpoint(original).files)
    (out / f".{names[2]}.partial").write_bytes(b"of a killed run")
    made = convert(original, out, min_bytes=1024)
    assert (made.num_found, made.num_files) == (2, num_files)
    assert [(out / name).stat().st_mtime_ns for name in left] == states
    assert not list(out.glob(".*"))
    again = convert(original, out, min_bytes=1024)
    assert again == replace(made, num_found=num_files)


KILLED = """
import os, signal, sys
from pathlib import Path
from ollm_core.convert import compress
files = iter(range(2))
def kill_at_the_second(*_):
    next(files) and os.kill(os.getpid(), signal.SIGKILL)
    return 0
compress.check_packed = kill_at_the_second
compress.convert(Path(sys.argv[1]), Path(sys.argv[2]), min_bytes=1024)
"""


def test_a_killed_conversion_goes_on(make_llama, tmp_path):
    """By SIGKILL, with a file written and not yet checked: it is written again."""
    original, out = make_llama(torch.bfloat16, shard="100KB"), tmp_path / "out"
    command = [sys.executable, "-c", KILLED, str(original), str(out)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert [path.suffix for path in sorted(out.iterdir())] == [".partial", ".safetensors"]
    made = convert(original, out, min_bytes=1024)
    assert made.num_found == 1
    assert not list(out.glob(".*"))


def test_a_full_disk_leaves_nothing(make_llama, tmp_path, monkeypatch):
    """One line with exit code 3; no half file, and no directory where there was none."""
    original, out = make_llama(torch.bfloat16), tmp_path / "out"
    full = OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch:
        stop_at(patch, "write_packed", 1, full)
        with pytest.raises(DoesNotFitError, match="No space left"):
            convert(original, out, min_bytes=1024)
    assert not out.exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 0, 9))
    with pytest.raises(DoesNotFitError, match="of disk, 9 B is free"):
        convert(original, out, min_bytes=1024)
    assert not out.exists()


def test_a_disk_that_lies_is_found_out(make_llama, tmp_path, monkeypatch):
    """A file that reads back otherwise than it was written does not get its name."""
    original, out = make_llama(torch.bfloat16), tmp_path / "out"

    def flips(tensors, target, *rest):
        writer.write_packed(tensors, target, *rest)
        low = writer.read_tensors(target)[0][f"{UP}.BF16.low"]
        with target.open("r+b") as file:
            file.seek(low.offset + 7)
            byte = file.read(1)[0]
            file.seek(low.offset + 7)
            file.write(bytes([byte ^ 16]))

    monkeypatch.setattr("ollm_core.convert.compress.write_packed", flips)
    with pytest.raises(OllmError, match=f"{UP} is not what was written"):
        convert(original, out, min_bytes=1024)
    assert not out.exists()


def test_what_is_refused(make_llama, tmp_path, monkeypatch):
    """A directory of something else, the model itself, one that is compressed, nothing to do."""
    original = make_llama(torch.bfloat16)
    made = convert(original, tmp_path / "out", min_bytes=1024)
    with pytest.raises(InputError, match="already compressed"):
        convert(made.path, tmp_path / "again")
    with pytest.raises(InputError, match="the model itself"):
        convert(original, original, min_bytes=1024)
    other = make_llama(torch.bfloat16, name="other", seed=1)
    with pytest.raises(InputError, match=r"holds 'model\.safetensors', which is not of this"):
        convert(other, made.path, min_bytes=1024)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes").write_text("x")
    with pytest.raises(InputError, match="holds 'notes'"):
        convert(original, mine, min_bytes=1024)
    assert (mine / "notes").read_text() == "x"
    with pytest.raises(InputError, match="is not a directory"):
        convert(original, mine / "notes", min_bytes=1024)
    with pytest.raises(InputError, match=r"cannot write to .*: Not a directory"):
        convert(original, mine / "notes" / "below", min_bytes=1024)
    locked = os.open(made.path, os.O_RDONLY)
    fcntl.flock(locked, fcntl.LOCK_EX)
    with pytest.raises(InputError, match="another conversion is writing there"):
        convert(original, made.path, min_bytes=1024)
    os.close(locked)
    with pytest.raises(InputError, match="no tensor of a layer can be compressed"):
        convert(make_llama(name="float32"), tmp_path / "new")
    with pytest.raises(UnsupportedError, match="only a CPU decodes"):
        ollm.plan(made.path, device="cuda", device_memory="8GB", host_memory="8GB")
    monkeypatch.setattr(compressed.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UnsupportedError, match="zstandard"):
        ollm.load(made.path, device="cpu")


def rewrite(path, change, **metadata):
    """The same file with other tensors."""
    save_file(change(load_file(path)), path, {compressed.FORMAT_KEY: compressed.FORMAT} | metadata)


ZSTD, LOW = f"{UP}.BF16.zstd", f"{UP}.BF16.low"
DAMAGES = {
    "no low bytes": (lambda t: {n: v for n, v in t.items() if n != LOW}, "lacks tensor"),
    "no high bytes": (lambda t: {n: v for n, v in t.items() if n != ZSTD}, "lacks tensor"),
    "other bytes": (lambda t: t | {LOW: t[LOW].char()}, "is I8, expected U8"),
    "another shape": (lambda t: t | {LOW: t[LOW].T.contiguous()}, r"decodes to shape \[64, 112\]"),
    "too few": (lambda t: t | {ZSTD: t[ZSTD][:9].clone()}, r"\[9\] bytes, expected a row"),
    "a table": (lambda t: t | {ZSTD: t[ZSTD].view(2, -1)}, "expected a row"),
    "both": (lambda t: t | {UP: torch.zeros(112, 64)}, "both as it is and encoded"),
    "a flipped bit": (
        lambda t: t | {ZSTD: t[ZSTD] ^ (torch.arange(len(t[ZSTD])) == 99).byte()},
        f"{UP}, frame 0 of 1 cannot be decoded",
    ),
    "two dtypes": (
        lambda t: (
            t | {f"{UP}.F16.{part}": t[f"{UP}.BF16.{part}"].clone() for part in ("low", "zstd")}
        ),
        "is stored as",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused(make_llama, tmp_path, ids, damage):
    """One clear line, when it is opened or when the tensor is first decoded."""
    out = convert(make_llama(torch.bfloat16), tmp_path / "out", min_bytes=1024).path
    change, message = DAMAGES[damage]
    rewrite(out / "model.safetensors", change)
    with (
        pytest.raises(CheckpointError, match=message) as refused,
        ollm.load(out, device="cpu", device_memory="50MB") as model,
    ):
        model(input_ids=ids(5)[None])
    assert "\n" not in str(refused.value)


def test_a_newer_form_is_refused(make_llama, tmp_path):
    """With a word of what this version reads."""
    out = convert(make_llama(torch.bfloat16), tmp_path / "out", min_bytes=1024).path
    rewrite(out / "model.safetensors", dict, **{compressed.FORMAT_KEY: "zstd-planes-2"})
    with pytest.raises(CheckpointError, match="compressed as 'zstd-planes-2', this version reads"):
        ollm.load(out, device="cpu")
