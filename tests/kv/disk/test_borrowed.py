"""One prefix, read by many processes at once: the right bits, and nothing goes under a reader."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
from collections import Counter
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from kept_prefixes import GEOMETRY, add, content, expected_kv, kept, numbers, open_store
from kept_states import PROMPT, check_tokens, keep_a_run, keeping
from kept_states import run as run_pass

import ollm
from ollm_core import DamagedKVError
from ollm_core.kv.disk.borrowed import OtherHomes, borrow_home
from ollm_core.kv.disk.directory import find_homes, reap_homes
from ollm_core.kv.disk.journal import read_journal

PROCESS = """
import sys
sys.path.insert(0, {tests!r})
import torch
from kept_prefixes import add, content, expected_kv, numbers, open_store
with open_store({directory!r}) as store:
    for line in sys.stdin:
        command, seed, length = line.split()
        prompt = numbers(int(length), int(seed))
        sequence, found = store.find(prompt)
        for layer_idx in range(2) if found else ():
            expected = expected_kv(prompt[:found], layer_idx)
            assert torch.equal(content(store, layer_idx, sequence), expected)
        if command == "add":
            add(store, sequence, prompt)
        print(found, flush=True)
"""


class Process:
    """A store in a process of its own, which finds and adds as it is told."""

    def __init__(self, directory: Path) -> None:
        code = PROCESS.format(tests=str(Path(__file__).parents[2]), directory=str(directory))
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, "-c", code], **pipes)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with suppress(BrokenPipeError):
            self.process.communicate()
        assert self.process.returncode in (0, -signal.SIGKILL)

    def tell(self, command: str, seed: int, length: int) -> None:
        self.process.stdin.write(f"{command} {seed} {length}\n")
        self.process.stdin.flush()

    def answer(self) -> int:
        return int(self.process.stdout.readline())

    def ask(self, command: str, seed: int, length: int) -> int:
        self.tell(command, seed, length)
        return self.answer()


def check(store, sequence, prompt):
    """The sequence holds `prompt` with the right bits."""
    assert store.num_tokens(sequence) == len(prompt)
    for layer_idx in range(2) if len(prompt) else ():
        assert torch.equal(content(store, layer_idx, sequence), expected_kv(prompt, layer_idx))


def check_owners(store):
    """Every block is counted once for each sequence that has it."""
    owners = Counter(
        (layer_idx, block)
        for tables in store._tables.values()
        for layer_idx, table in enumerate(tables)
        for block in table.blocks.values()
    )
    assert all(store._manager._num_sharers[key] == count - 1 for key, count in owners.items())


def found(store, prompt):
    """How many tokens a store finds, checked, and the sequence that has them."""
    sequence, num_tokens = store.find(prompt)
    check(store, sequence, prompt[:num_tokens])
    return num_tokens, sequence


def journals(directory):
    """Lengths of what the homes keep."""
    return sorted(
        len(prefix.token_ids) for home in find_homes(directory) for prefix in read_journal(home)[1]
    )


def test_many_processes_find_one_prefix(tmp_path):
    """All at once, each to the last token, while the one that has kept it is still at work."""
    with ExitStack() as stack:
        processes = [stack.enter_context(Process(tmp_path)) for _ in range(4)]
        assert processes[0].ask("add", 1, 42) == 0
        for process in processes[1:]:
            process.tell("find", 1, 42)
        # What has no full block yet is kept at the end: 40 of 42 are there.
        assert [process.answer() for process in processes[1:]] == [40, 40, 40]
        assert processes[0].ask("add", 2, 30) == 0
        assert processes[1].ask("find", 2, 30) == 28
    assert journals(tmp_path) == [30, 42]


def test_a_reader_outlives_the_owner(tmp_path):
    """Killed or done, what it kept is read on, also while another one owns and grows it."""
    with Process(tmp_path) as owner, open_store(tmp_path) as reader:
        assert owner.ask("add", 1, 40) == 0
        num_tokens, sequence = found(reader, numbers(40))
        assert num_tokens == 40
        owner.process.kill()
        owner.process.wait()
        with Process(tmp_path) as next_owner:
            assert next_owner.ask("add", 1, 60) == 40
            assert next_owner.ask("add", 5, 50) == 0
            check(reader, sequence, numbers(40))
        add(reader, sequence, numbers(48))
        check(reader, sequence, numbers(48))


def test_nothing_goes_under_a_reader(tmp_path):
    """Blocks of a prefix that its owner drops are written again only when nobody reads them."""
    with open_store(tmp_path) as owner, open_store(tmp_path) as reader:
        first = owner.new_sequence()
        add(owner, first, numbers(42))
        owner.release(first)
        num_tokens, sequence = found(reader, numbers(40))
        assert num_tokens == 40
        size = owner.tier_bytes().disk
        owner._drop(owner._pins[0])
        for seed in range(2, 6):
            other = owner.new_sequence()
            add(owner, other, numbers(40, seed))
            owner.release(other)
            owner._drop(owner._pins[-1])
            check(reader, sequence, numbers(40))
        assert owner.tier_bytes().disk >= 4 * size
        reader.release(sequence)
        assert found(reader, numbers(40))[0] == 0  # nobody keeps it any more: it was let go
        owner.find(numbers(3, 9))
        assert owner.tier_bytes().disk <= 3 * 4096


def test_an_owner_that_opens_a_home_cuts_nothing_that_is_read(tmp_path):
    """Not even what is kept no more; the next one does."""
    kept(tmp_path, numbers(42))
    with open_store(tmp_path) as owner, open_store(tmp_path) as reader:
        num_tokens, sequence = found(reader, numbers(42))
        assert num_tokens == 42
        owner._drop(owner._pins[0])
        add(owner, owner.find(numbers(9, 5))[0], numbers(9, 5))
        owner.close()
        with open_store(tmp_path) as next_owner:
            assert found(next_owner, numbers(9, 5))[0] == 9
            add(next_owner, next_owner.new_sequence(), numbers(80, 6))
            check(reader, sequence, numbers(42))
    with open_store(tmp_path) as last:
        assert found(last, numbers(80, 6))[0] == 80
        assert [file.num_free for file in last._disk._files] == [12, 12]


def test_little_that_is_added_is_not_kept(tmp_path):
    """It would be of no use without what was borrowed, nor is it copied."""
    with open_store(tmp_path) as owner, open_store(tmp_path) as reader:
        add(owner, owner.new_sequence(), numbers(40))
        num_tokens, sequence = found(reader, numbers(60))
        assert num_tokens == 40
        add(reader, sequence, numbers(60))
        check(reader, sequence, numbers(60))
        assert reader.tier_bytes().disk == 2 * 4096 * (1 + 5)
        reader.close()
        assert journals(tmp_path) == [40]


def test_much_that_is_added_is_kept_whole(tmp_path):
    """With a copy of what was borrowed, so that it stands alone."""
    with open_store(tmp_path) as owner, open_store(tmp_path) as reader:
        add(owner, owner.new_sequence(), numbers(20))
        num_tokens, sequence = found(reader, numbers(61))
        assert num_tokens == 20
        forked = reader.fork(sequence)
        add(reader, sequence, numbers(61))
        check(reader, sequence, numbers(61))
        check(reader, forked, numbers(20))
        assert journals(tmp_path) == [20, 60]
        shutil.rmtree(owner._disk.home.directory)
        check(reader, sequence, numbers(61))
    with open_store(tmp_path) as store:
        assert found(store, numbers(61))[0] == 61


def test_cuts_and_forks_within_what_is_borrowed(tmp_path):
    """Nothing is ever written to a home that is not ours."""
    kept(tmp_path, numbers(42))
    (home,) = find_homes(tmp_path)
    with open_store(tmp_path) as owner, open_store(tmp_path) as reader:
        before = {path: path.read_bytes() for path in home.glob("layer-*")}
        _, sequence = found(reader, numbers(42))
        for length in (41, 38, 36, 17, 3):
            forked = reader.fork(sequence, length)
            check(reader, forked, numbers(length))
            reader.truncate(sequence, length)
            check(reader, sequence, numbers(length))
            add(reader, forked, torch.cat([numbers(length), numbers(11, 7)]))
            check(reader, forked, torch.cat([numbers(length), numbers(11, 7)]))
        add(reader, sequence, numbers(42))
        check(reader, sequence, numbers(42))
        assert {path: path.read_bytes() for path in home.glob("layer-*")} == before
        assert found(owner, numbers(42))[0] == 42


def test_damage_is_not_borrowed_twice(tmp_path):
    """It is found by its checksum, as that of our own."""
    with open_store(tmp_path) as owner, open_store(tmp_path) as reader:
        add(owner, owner.new_sequence(), numbers(40))
        add(owner, owner.new_sequence(), numbers(24, 2))
        _, sequence = found(reader, numbers(40))
        with (owner._disk.home.directory / "layer-00001.kv").open("r+b") as file:
            file.seek(4096 * 3 + 7)
            file.write(b"\xff\xff\xff\xff")
        with pytest.raises(DamagedKVError, match="block 2 is not what was"):
            content(reader, 1, sequence)
        for _ in range(3):
            assert found(reader, numbers(40))[0] == 0
            reader.release(sequence)  # it is given back, and read again
            assert found(reader, numbers(24, 2))[0] == 24
        assert journals(tmp_path) == [24, 40]  # that is its owner's to drop


@pytest.mark.parametrize(
    ("change", "fingerprint"),
    [({}, "beef"), ({"dtype": torch.float64}, "f00d"), ({"block_size": 8}, "f00d")],
)
def test_nothing_is_borrowed_of_another_model(tmp_path, change, fingerprint):
    """Nor of another dtype or block size."""
    with open_store(tmp_path) as owner:
        add(owner, owner.new_sequence(), numbers(40))
        with open_store(tmp_path, replace(GEOMETRY, **change), fingerprint) as other:
            assert other.find(numbers(40))[1] == 0
        (home,) = find_homes(tmp_path)
        assert borrow_home(home, replace(GEOMETRY, **change), fingerprint) is None
        with borrow_home(home, GEOMETRY, "f00d") as borrowed:
            assert [len(one.token_ids) for one in borrowed.prefixes()] == [40]


def test_a_journal_is_read_when_it_has_changed(tmp_path, monkeypatch):
    """And only then."""
    from ollm_core.kv.disk import borrowed

    reads = []
    monkeypatch.setattr(
        borrowed, "read_journal", lambda path: reads.append(path) or read_journal(path)
    )
    others = OtherHomes(tmp_path, GEOMETRY, "f00d")
    wanted = numbers(40).to(torch.int32)
    with open_store(tmp_path) as owner:
        add(owner, owner.new_sequence(), numbers(20))
        for _ in range(3):
            assert [number for number, _ in others.matches(wanted, ())] == [20]
        assert others.matches(wanted, [owner._disk.home.directory]) == []
        assert len(reads) == 1
        add(owner, owner.new_sequence(), numbers(30))
        assert [number for number, _ in others.matches(wanted, ())] == [28]
        assert len(reads) == 2


@pytest.mark.parametrize("seed", range(4))
def test_any_walk(tmp_path, seed):
    """Stores that open, find, add, cut, release, forget and close beside each other over one
    directory: whatever any of them holds at any time has the right bits.
    """
    chance = random.Random(seed)
    stores: dict[int, tuple] = {}
    longest = 0
    with ExitStack() as stack:
        for step in range(220):
            name = chance.randrange(4)
            if name not in stores:
                stores[name] = stack.enter_context(open_store(tmp_path)), {}
            store, held = stores[name]
            action = chance.choices(["find", "add", "cut", "release", "drop", "close"],
                                    [6, 6, 2, 4, 1, 1])[0]  # fmt: skip
            if action == "find":
                prompt = torch.cat([numbers(chance.randrange(50), chance.randrange(3)),
                                    numbers(chance.randrange(6), 100 + step)])  # fmt: skip
                num_tokens, sequence = found(store, prompt)
                held[sequence] = prompt[:num_tokens]
                longest = max(longest, num_tokens if len(store._loans) else 0)
            elif action == "close":
                store.close()
                del stores[name]
            elif action == "drop" and store._pins:
                store._drop(chance.choice(store._pins))
            elif held:
                sequence = chance.choice(sorted(held))
                if action == "add":
                    more = numbers(len(held[sequence]) + chance.randrange(30), chance.randrange(3))
                    if not torch.equal(more[: len(held[sequence])], held[sequence]):
                        more = torch.cat([held[sequence], more[:9]])
                    add(store, sequence, more)
                    held[sequence] = more
                elif action == "cut":
                    held[sequence] = held[sequence][: chance.randrange(len(held[sequence]) + 1)]
                    store.truncate(sequence, len(held[sequence]))
                elif action == "release":
                    store.release(sequence)
                    del held[sequence]
            for other, sequences in stores.values():
                check_owners(other)
                for sequence, prompt in sequences.items():
                    check(other, sequence, prompt)
    assert longest > 20


WALKER = """
import itertools, random, sys, torch
sys.path.insert(0, {tests!r})
from kept_prefixes import add, content, expected_kv, numbers, open_store
chance = random.Random({seed})
for step in itertools.count():
    with open_store({directory!r}) as store:
        for _ in range(chance.randrange(1, 5)):
            prompt = torch.cat([numbers(60, chance.randrange(4)), numbers(8, 100 + step)])
            sequence, found = store.find(prompt)
            add(store, sequence, prompt[: chance.randrange(found, 69)])
            length = store.num_tokens(sequence)
            for layer_idx in range(2) if length else ():
                expected = expected_kv(prompt[:length], layer_idx)
                assert torch.equal(content(store, layer_idx, sequence), expected)
            print(found if store._loans else 0, flush=True)
            if chance.randrange(2):
                store.release(sequence)
"""


def test_processes_that_are_killed_beside_others(tmp_path):
    """Three that find, add and check on one directory, each of which is killed at some moment and
    comes back: none ever has a wrong bit, and nothing is left behind.
    """
    tests, chance = str(Path(__file__).parents[2]), random.Random(3)
    longest, seeds = 0, iter(range(1000))

    def start():
        code = WALKER.format(tests=tests, directory=str(tmp_path), seed=next(seeds))
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([sys.executable, "-c", code], **pipes)

    processes = [start() for _ in range(3)]
    try:
        for _ in range(5):
            place = chance.randrange(3)
            for _ in range(chance.randint(1, 6)):
                line = processes[place].stdout.readline()
                assert line, processes[place].stderr.read()
                longest = max(longest, int(line))
            processes[place].kill()
            processes[place].communicate()
            processes[place] = start()
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert longest > 20
    reap_homes(tmp_path)
    assert all(read_journal(home)[1] for home in tmp_path.iterdir())


def test_recurrent_states_of_another_process(tmp_path):
    """They are in files of their own: found where the keys and values are borrowed."""
    keep_a_run(tmp_path, PROMPT, answer=[50, 51, 52])
    with keeping(tmp_path) as owner, keeping(tmp_path) as reader:
        for store in (owner, reader):
            known = [*PROMPT, 50, 51, 52]
            sequence, num_tokens = store.find(torch.tensor([*known, 60]))
            assert num_tokens == 24
            check_tokens(store, sequence, known)
            run_pass(store, sequence, known, [60, 61])
            check_tokens(store, sequence, [*known, 60, 61])
        assert reader._kept._loans
        states = set(tmp_path.glob("ollm-states-*/*"))
        reader.commit(sequence)
        reader.keep(sequence, 24, torch.tensor([60, 61]))
        reader.close()
        assert set(tmp_path.glob("ollm-states-*/*")) == states  # of no use without its keys


def test_two_models_at_once(tiny, ids, tmp_path):
    """Both begin with the prompt that a third has read, and give its tokens."""
    prompt = ids(700)[None]
    options = {
        "device": "cpu", "kv": "disk", "kv_dir": tmp_path / "kv", "attention": "exact",
        "max_new_tokens": 5, "do_sample": False, "eos_token_id": None,
    }  # fmt: skip
    loading = {name: options.pop(name) for name in ("device", "kv", "kv_dir", "attention")}
    with ollm.load(tiny, **loading) as first:
        expected = first.generate(prompt, **options)
    with ExitStack() as stack:
        models = [stack.enter_context(ollm.load(tiny, **loading)) for _ in range(2)]
        caches = [model.generate(prompt, **options, return_dict_in_generate=True)
                  for model in models]  # fmt: skip
        for model, made in zip(models, caches, strict=True):
            assert torch.equal(made.sequences, expected)
            assert model.stats.cached_tokens >= 699
