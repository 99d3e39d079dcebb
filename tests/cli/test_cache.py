"""`ollm cache`: what runs have kept is shown, verified, pruned, pinned and removed."""

import json
import os
import re
import time
from dataclasses import replace

import pytest
import torch
from kept_prefixes import GEOMETRY, add, expected_kv, kept, numbers, open_store
from kept_states import PROMPT, keep_a_run

from ollm_core.kv.disk.checkpoints import CheckpointingStore
from ollm_core.kv.disk.inventory import take_inventory
from ollm_core.kv.disk.journal import Journal, read_journal
from ollm_core.kv.disk.marks import mark_used
from ollm_core.kv.disk.unfinished import read_unfinished, unfinished_files, write_unfinished
from ollm_core.memory.accounts import MemoryAccount


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


def test_nothing_kept(ollm, tmp_path):
    """Is said, not shown as a table without rows."""
    for verb in ("list", "verify"):
        assert ollm("cache", verb, "--kv-dir", tmp_path)[:2] == (
            0,
            f"no cached prefixes in {tmp_path}\n",
        )


@pytest.fixture
def kv_dir(tmp_path):
    """A directory with two prefixes of one model and one of another, used one after the other."""
    kept(tmp_path / "kv", numbers(41), numbers(20, 2))
    with open_store(tmp_path / "kv", fingerprint="beef" * 16) as store:
        sequence = store.new_sequence()
        add(store, sequence, numbers(13, 3))
    age(tmp_path / "kv", {41: 30, 20: 3, 13: 0.1})
    return tmp_path / "kv"


def age(directory, days):
    """Mark each prefix, by its number of tokens, as used so many days ago."""
    for one in take_inventory(directory).prefixes:
        mark_used(one.directory, one.prefix.key)
        when = time.time() - days[len(one.prefix.token_ids)] * 86400
        os.utime(one.directory / f"prefixes.{one.id}.used", (when, when))
        path = one.directory / "prefixes.journal"
        # The time at which it was kept is in the journal: as old as that.
        prefixes = [replace(each, seconds=1) for each in read_journal(one.directory)[1]]
        fields = {k: v for k, v in read_journal(one.directory)[0].items() if k != "version"}
        with Journal(path.parent, fields, create=False) as journal:
            journal.replace(prefixes)


def lengths(ollm, kv_dir):
    """Tokens of what `list` shows, in its order."""
    shown = json.loads(ollm("cache", "list", "--kv-dir", kv_dir, "--json")[1])
    return [one["num_tokens"] for one in shown["prefixes"]]


@pytest.mark.parametrize(
    ("arguments", "left"),
    [
        (["--older-than", "4w"], [20, 13]),
        (["--older-than", "2d"], [13]),
        (["--older-than", "0.5h"], []),
        (["--to", "99kB"], [20, 13]),
        (["--to", "50kB"], [13]),
        (["--to", "1B"], []),
        (["--model", "f00d"], [13]),
        (["--model", "beef"], [41, 20]),
        (["--model", "beef", "--older-than", "2d"], [41, 20, 13]),
        (["--older-than", "2d", "--to", "99kB"], [20, 13]),
        (["--older-than", "40d", "--to", "1B"], [41, 20, 13]),
    ],
)
def test_prune(ollm, kv_dir, arguments, left):
    """By age, by size and per model; the least recently used first."""
    assert lengths(ollm, kv_dir) == [41, 20, 13]
    code, out, err = ollm("cache", "prune", *arguments, "--kv-dir", kv_dir, "--json")
    assert (code, err) == (0, "")
    assert len(json.loads(out)["removed"]) == 3 - len(left)
    assert lengths(ollm, kv_dir) == left
    assert (
        f"removed 0 of {len(left)} cached"
        in ollm("cache", "prune", *arguments, "--kv-dir", kv_dir)[1]
    )


def test_models_have_names(ollm, home, kv_dir, tiny_chat):
    """A model that was opened is shown, and pruned, by what its directory is called."""
    names = home / ".cache/ollm/identity/names.json"
    names.parent.mkdir(parents=True, mode=0o700)
    known = {one.fingerprint for one in take_inventory(kv_dir).prefixes}
    beef, food = sorted(known)
    names.write_text(json.dumps({beef: "org/one", food: "bad\x1bname"}))
    ollm("run", tiny_chat, "--prompt", "a", "--max-new-tokens", 1, "--kv-dir", kv_dir)
    shown = ollm("cache", "list", "--kv-dir", kv_dir)[1]
    assert re.findall(r"^\w{12}  (\S+)", shown, re.MULTILINE).count("org/one") == 1
    assert tiny_chat.name in shown
    assert food[:12] in shown
    where = ["--kv-dir", kv_dir]
    assert ollm("cache", "prune", "--model", "org/one", *where)[0] == 0
    assert beef not in {one.fingerprint for one in take_inventory(kv_dir).prefixes}
    assert "removed 0 of 3" in ollm("cache", "prune", "--model", "org/one", *where)[1]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "give --older-than, --to or --model"),
        (["--older-than", "soon"], "--older-than 'soon' is not an age"),
        (["--older-than", "1" * 30 + "d"], "is not an age"),
        (["--to", "much"], "'much' is not a memory size"),
    ],
)
def test_prune_that_says_nothing(ollm, kv_dir, arguments, reason):
    """Removes nothing."""
    code, out, err = ollm("cache", "prune", *arguments, "--kv-dir", kv_dir)
    assert (code, out) == (2, "")
    assert reason in err
    assert lengths(ollm, kv_dir) == [41, 20, 13]


def test_pins(ollm, kv_dir):
    """What is pinned outlives every prune, and goes when it is unpinned, or removed by name."""
    where = ["--kv-dir", kv_dir]
    shown = json.loads(ollm("cache", "list", *where, "--json")[1])["prefixes"]
    for one in shown[:2]:
        out = json.loads(ollm("cache", "pin", one["id"][:8], *where, "--json")[1])
        assert [one["pinned"] for one in out["prefixes"]] == [True]
    assert ollm("cache", "list", *where)[1].count("pinned") == 2
    assert ollm("cache", "prune", "--to", "1B", *where)[0] == 0
    assert lengths(ollm, kv_dir) == [41, 20]
    assert ollm("cache", "pin", "00", *where)[0] == 2
    assert ollm("cache", "unpin", shown[0]["id"], *where)[1].startswith("unpinned ")
    assert ollm("cache", "prune", "--older-than", "1d", *where)[0] == 0
    assert lengths(ollm, kv_dir) == [20]
    assert ollm("cache", "remove", shown[1]["id"], *where)[0] == 0
    assert list(kv_dir.iterdir()) == []


def test_what_is_in_use_stays(ollm, kv_dir):
    """Owned or read by another process: told, exit code 2, and the rest goes."""
    where = ["--kv-dir", kv_dir]
    with open_store(kv_dir) as owner, open_store(kv_dir) as reader:
        assert reader.find(numbers(41))[1] == 41
        for _ in range(2):
            code, out, err = ollm("cache", "prune", "--to", "1B", *where, "--json")
            assert (code, json.loads(out)["in_use"]) == (2, 2)
            assert "2 cached prefixes are in use by another process" in err
            assert ollm("cache", "remove", "--all", *where)[0] == 2
            assert lengths(ollm, kv_dir) == [20, 41]  # which was read last
            owner.close()
    assert ollm("cache", "prune", "--to", "1B", *where)[0] == 0
    assert list(kv_dir.iterdir()) == []


def test_states_are_shown_and_verified(ollm, tmp_path):
    """With the prefix that leads to them; what is of none goes when it is a day old."""
    keep_a_run(tmp_path, PROMPT, answer=[50, 51])
    where = ["--kv-dir", tmp_path, "--json"]
    (one,) = json.loads(ollm("cache", "list", *where)[1])["prefixes"]
    assert (one["num_states"], one["state_bytes"] > 3 * 4096) == (3, True)
    assert ollm("cache", "verify", *where)[0] == 0
    path = max(tmp_path.glob("ollm-states-*/23-*"))
    data = bytearray(path.read_bytes())
    data[4100] ^= 1
    path.write_bytes(data)
    code, out, _ = ollm("cache", "verify", *where)
    assert (code, json.loads(out)["num_left"]) == (1, 1)
    wrong = {one["num_tokens"]: one["wrong"] for one in json.loads(out)["states"]}
    assert [bool(wrong[number]) for number in (20, 21, 23)] == [False, False, True]
    assert "not what was written" in wrong[23]
    assert ollm("cache", "verify", "--remove", *where)[0] == 0
    assert not path.exists()
    assert json.loads(ollm("cache", "list", *where)[1])["prefixes"][0]["num_states"] == 2
    stray = path.with_name(f"24-{'0' * 32}-bfloat16.state")
    stray.write_bytes(b"OLLMKV\0\1")
    assert len(json.loads(ollm("cache", "list", *where)[1])["states"]) == 1
    for old in (False, True):
        if old:
            os.utime(stray, (5, 5))
        out = json.loads(ollm("cache", "prune", "--older-than", "9d", *where)[1])
        assert len(out["removed_states"]) == old
        assert stray.exists() is not old
    assert ollm("cache", "remove", "--all", *where)[0] == 0
    assert list(tmp_path.iterdir()) == []


def test_verify_removes_what_is_damaged(ollm, kv_dir):
    """And nothing else; what is left is sound."""
    where = ["--kv-dir", kv_dir, "--json"]
    home = next(one.directory for one in take_inventory(kv_dir).prefixes)
    with (home / "layer-00001.kv").open("r+b") as file:
        file.seek(4096 * 2)
        file.write(b"\xff" * 8)
    code, out, _ = ollm("cache", "verify", *where)
    assert (code, json.loads(out)["num_left"]) == (1, 1)
    assert lengths(ollm, kv_dir) == [41, 20, 13]
    assert "removed 1 of 1 damaged ones" in ollm("cache", "verify", "--remove", *where[:2])[1]
    assert lengths(ollm, kv_dir) == [20, 13]
    assert ollm("cache", "verify", *where)[0] == 0


def test_a_hostile_directory(ollm, kv_dir, tmp_path):
    """Links, files of others and damaged journals: a line each, and nothing of them is touched."""
    outside = tmp_path / "outside"
    outside.mkdir(0o700)
    (outside / "layer-00000.kv").write_bytes(b"OLLMKV\0\1 mine")
    (kv_dir / "ollm-kv-link").symlink_to(outside)
    (kv_dir / "ollm-states-link").symlink_to(outside)
    (kv_dir / "ollm-kv-open").mkdir(0o755)
    (kv_dir / "ollm-kv-open" / "mine.txt").write_text("mine")
    damaged = kv_dir / "ollm-kv-damaged"
    damaged.mkdir(0o700)
    (damaged / "prefixes.journal").write_bytes(b"OLLMKV\0\1{" + b"[" * 4090)
    home = take_inventory(kv_dir).prefixes[0].directory
    (home / "mine.txt").write_text("mine")
    (home / "layer-00009.kv").symlink_to(outside / "layer-00000.kv")
    states = kv_dir / f"ollm-states-{'a' * 64}"
    states.mkdir(0o700)
    (states / "mine.state").write_text("mine")
    (states / f"5-{'0' * 32}-float32.state").symlink_to(outside / "layer-00000.kv")
    before = {path: path.is_symlink() or path.is_dir() or path.read_bytes()
              for path in sorted(tmp_path.rglob("*")) if "mine" in path.name or path.is_symlink()
              or outside in path.parents}  # fmt: skip
    code, out, err = ollm("cache", "list", "--kv-dir", kv_dir, "--json")
    remarks = json.loads(out)["remarks"]
    assert code == 0
    assert err == ""
    told = {
        f"{kv_dir}/ollm-kv-link: a link, left alone",
        f"{kv_dir}/ollm-states-link: a link or not private to this user, left alone",
        f"{kv_dir}/ollm-kv-open: not private to this user, left alone",
        f"{damaged}/prefixes.journal: the header of the KV file is damaged",
        f"{home}/mine.txt: not a file of ollm",
        f"{home}/layer-00009.kv: not a file of ollm",
        f"{states}/mine.state: not a file of ollm",
        f"{states}/5-{'0' * 32}-float32.state: not a file of ollm",
    }
    assert set(remarks) == told
    err = ollm("cache", "list", "--kv-dir", kv_dir)[2]
    assert err.count("warning: ") == len(told)
    for arguments in (["verify", "--remove"], ["prune", "--to", "1B"], ["remove", "--all"]):
        assert ollm("cache", *arguments, "--kv-dir", kv_dir, "--json")[0] == 0
    after = {path: path.is_symlink() or path.is_dir() or path.read_bytes() for path in before}
    assert after == before
    assert lengths(ollm, kv_dir) == []


@pytest.fixture
def begun(kv_dir):
    """The same, with a prompt of 31 tokens that was broken off after one layer of two."""
    with CheckpointingStore(GEOMETRY, MemoryAccount("memory", 10**8), kv_dir, "f00d") as store:
        prompt = numbers(31, 9)
        sequence, _ = store.find(prompt)
        store.reserve(sequence, 31)
        checkpoint = store.checkpoint(sequence, prompt, {}, [torch.float32])
        keys, values = expected_kv(prompt, 0)
        store.append(0, sequence, keys, values)
        assert checkpoint.save(1, [torch.ones(31, 7)])
        store.truncate(sequence, 0)
        store.release(sequence)
    return kv_dir


def test_an_unfinished_prompt_is_shown(ollm, begun):
    """And how far it is; it counts."""
    code, out, _ = ollm("cache", "list", "--kv-dir", begun)
    assert code == 0
    assert re.search(
        r"^unfinished prompt \w{12} of model f00d: 31 tokens, 1 of 2 layers done", out, re.M
    )
    told = json.loads(ollm("cache", "list", "--kv-dir", begun, "--json")[1])
    [one] = told["unfinished"]
    assert (one["num_tokens"], one["num_layers_done"], one["num_layers"]) == (31, 1, 2)
    assert told["num_bytes"] == one["num_bytes"] + sum(
        prefix["num_bytes"] for prefix in told["prefixes"]
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["remove", "--all"],
        ["remove", "ID"],
        ["prune", "--to", "1B"],
        ["prune", "--older-than", "1h"],
        ["prune", "--model", "f00d"],
    ],
)
def test_an_unfinished_prompt_is_removed(ollm, begun, arguments):
    """As prefixes are; not while a process has it."""
    [one] = take_inventory(begun).unfinished
    [path] = unfinished_files(one.directory)
    when = time.time() - 7200
    raw = path.read_bytes()
    index = replace(one.one.prefix, seconds=int(when))
    tensors = [torch.ones(31, 7)]
    fields, _ = read_unfinished(path)
    fields.pop("version")
    staging = torch.zeros(4096, dtype=torch.uint8)
    write_unfinished(one.directory, fields, replace(one.one, prefix=index), tensors, staging)
    assert path.read_bytes() != raw
    arguments = [one.one.id[:8] if word == "ID" else word for word in arguments]
    with open_store(begun):
        code, _, err = ollm("cache", *arguments, "--kv-dir", begun)
        assert code == 2
        assert "1 unfinished prompts are in use" in err.replace("cached prefixes and ", "")
    before = len(take_inventory(begun).prefixes)
    code, out, _ = ollm("cache", *arguments, "--kv-dir", begun)
    assert code == 0
    assert "1 of 1 unfinished prompts" in out
    assert take_inventory(begun).unfinished == []
    if arguments[-1] in (one.one.id[:8], "1h"):
        assert len(take_inventory(begun).prefixes) in (before, before - 2)


@pytest.mark.parametrize(
    "arguments", [["prune", "--older-than", "1h"], ["prune", "--model", "beef"]]
)
def test_another_unfinished_prompt_stays(ollm, begun, arguments):
    """That is young, or of another model."""
    assert ollm("cache", *arguments, "--kv-dir", begun)[0] == 0
    assert len(take_inventory(begun).unfinished) == 1


@pytest.mark.parametrize("where", ["hidden", "block"])
def test_a_damaged_unfinished_prompt_is_verified_and_removed(ollm, begun, where):
    """By its checksums."""
    [one] = take_inventory(begun).unfinished
    path, place = unfinished_files(one.directory)[0], one.one.file_bytes - 1
    if where == "block":
        path = one.directory / "layer-00000.kv"
        place = 4096 * (1 + one.one.prefix.layers[0].blocks[3]) + 11
    assert ollm("cache", "verify", "--kv-dir", begun)[0] == 0
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    code, out, _ = ollm("cache", "verify", "--kv-dir", begun, "--json")
    assert code == 1
    assert "not what was written" in json.loads(out)["unfinished"][0]["wrong"]
    code, out, _ = ollm("cache", "verify", "--remove", "--kv-dir", begun)
    assert code == 0
    assert "removed 1 of 1 damaged ones" in out
    assert take_inventory(begun).unfinished == []
