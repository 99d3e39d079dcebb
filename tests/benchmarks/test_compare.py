"""benchmarks/peers/compare.py with stand-ins that print a line, and what it needs beside them."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from benchmarks.peers.compare import OURS, compete, conclude, main, summary
from benchmarks.peers.copies import prepare, write_gguf, write_tokenizer
from benchmarks.peers.environments import LLAMACPP_AVX2, PEERS, BuildError, Peer, environment_of
from benchmarks.peers.programs import Program
from benchmarks.tools.children import ChildError, result_of
from benchmarks.tools.make_checkpoint import Shape, write_checkpoint
from benchmarks.tools.measure import environment
from ollm_core.text.tokenizer import open_tokenizer

LINE = {
    "prefill_s": 3.0,
    "decode_tok_s": 2.0,
    "decode_gb_s": 1.0,
    "cpu_s": 4.0,
    "peak_anon_mb": 300,
    "tokens": [5, 6, 7],
}


@pytest.fixture
def contest(tmp_path):
    """Runs stand-ins in turns; returns the exit code and the record. Each notes that it ran."""
    (tmp_path / "weights").write_bytes(bytes(8 << 20))

    def stand_in(name, code):
        noted = f"open({str(tmp_path / 'order')!r}, 'a').write('{name} ')\n"
        command = [sys.executable, "-S", "-c", noted + code]
        return Program(name, f"The {name}", command, [tmp_path / "weights"])

    def run(rounds=2, cap=None, **codes):
        programs = [stand_in(name.replace("ours", OURS), code) for name, code in codes.items()]
        runs, failed = compete(programs, tmp_path, rounds=rounds, cap=cap)
        titles = {program.name: program.title for program in programs}
        told = summary(runs, failed, titles, (3 << 30, 2 << 30), cap or 1500)
        code = conclude(
            {**environment(tmp_path), **told}, tmp_path / "found.json", tmp_path / "found.png"
        )
        return code, json.loads((tmp_path / "found.json").read_text())

    return run


def prints(**changes):
    """Code that prints the line that is wanted, and others around it."""
    line = json.dumps({**LINE, **changes})
    return f"print('hello')\nprint({line!r})\nprint('bye')"


def test_in_turns_with_the_same_tokens(contest, tmp_path, capsys):
    """A B C, A B C; ratios, a table, a record and a picture; exit code 0."""
    codes = {"b": prints(decode_tok_s=0.5, prefill_s=1.5), "c": prints()}
    code, record = contest(ours=prints(), **codes)
    assert code == 0
    assert (tmp_path / "order").read_text().split() == [OURS, "b", "c"] * 2
    assert record["ratios"]["b"] == {"decode": [4.0, 4.0], "prefill": [0.5, 0.5]}
    assert record["other_tokens"] == []
    disk = record["bounds"]["disk_gb_s"] * 1e9
    assert record["bounds"]["nothing_kept_tok_s"] == pytest.approx(disk / (2 << 30), 0.01)
    assert record["bounds"]["cap_full_tok_s"] == pytest.approx(disk / (548 << 20), 0.01)
    assert (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG")
    out, err = capsys.readouterr()
    assert "The b" in out
    assert "4.0x" in out
    assert "all gave the same tokens" in err


def test_other_tokens(contest, tmp_path, capsys):
    """Also if only in the second round: exit code 1, and who it was."""
    late = f"import json\ntimes = open({str(tmp_path / 'order')!r}).read().count('b')\n"
    late += f"print(json.dumps({LINE!r} | {{'tokens': [5, 6, 6 + times]}}))"
    code, record = contest(ours=prints(tokens=[5, 6, 7]), b=late, c=prints())
    assert code == 1
    assert record["other_tokens"] == ["b"]
    assert "error: other tokens than those of ollm-core came from b\n" in capsys.readouterr().err


def test_a_peer_that_fails(contest, tmp_path, capsys):
    """Is told in one line and recorded, and not run again; the others go on."""
    code, record = contest(
        ours=prints(),
        b="import sys\nsys.stderr.write('no model\\n\\n')\nsys.exit(3)",
        c="print('nothing')",
        d="print('{}')",
        e="import os\nos.kill(os.getpid(), 9)",
        f=prints(),
    )
    assert code == 0
    assert record["failed"]["b"] == "exit code 3, no model"
    assert record["failed"]["c"] == "it printed no line of JSON"
    assert record["failed"]["d"].startswith("its line lacks prefill_s, decode_tok_s")
    assert "killed" in record["failed"]["e"]
    assert record["runs"].keys() == {OURS, "f"}
    order = (tmp_path / "order").read_text().split()
    assert order == [OURS, "b", "c", "d", "e", "f", OURS, "f"]
    assert "The b failed: exit code 3, no model\n" in capsys.readouterr().err


@pytest.mark.parametrize("codes", [{"ours": "1/0", "b": prints()}, {"ours": prints(), "b": "1/0"}])
def test_nothing_to_compare(contest, codes):
    """Without ours, or without any peer."""
    code, record = contest(rounds=1, **codes)
    assert code == 1
    assert len(record["runs"]) == 1


def test_a_run_that_takes_too_long(tmp_path):
    """Is ended, with what it has started."""
    noted = tmp_path / "pid"
    with pytest.raises(ChildError, match="no result after 1 s"):
        result_of(["sh", "-c", f"sleep 600 & echo $! > {noted}; wait"], seconds=1)
    started = Path("/proc", noted.read_text().strip(), "stat")
    for _ in range(1000):  # it has its signal, and ends when the kernel gets to it
        try:
            if ") Z " in started.read_text():
                break
        except OSError:
            break
        time.sleep(0.01)
    else:
        pytest.fail("what it has started still runs")


def test_options(monkeypatch, capsys):
    """A peer that there is not is refused before anything is installed or written."""
    monkeypatch.setattr(sys, "argv", ["compare.py", "--peers", "llamacpp,other", "--cap", "0"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "no such peer: other; there are llamacpp, " in capsys.readouterr().err


def test_an_environment_that_cannot_be_made(tmp_path, monkeypatch):
    """One line that says why, and where the rest is."""
    monkeypatch.setattr(sys, "executable", "/bin/false")
    peer = PEERS["accelerate"]
    with pytest.raises(BuildError, match=r"accelerate\.log has the rest"):
        environment_of(peer, tmp_path, lambda text: None)
    assert not (tmp_path / "accelerate" / "installed.json").exists()


def test_every_peer_has_its_files():
    """Requirements, and a way to open it."""
    from benchmarks.peers.run_peer import OPEN

    peers = {**PEERS, LLAMACPP_AVX2.name: LLAMACPP_AVX2}
    assert OPEN.keys() == peers.keys()
    for peer in peers.values():
        assert isinstance(peer, Peer)
        assert (Path(sys.modules[Peer.__module__].__file__).parent / f"{peer.name}.txt").is_file()


def test_the_gguf_has_the_same_weights(tmp_path):
    """As transformers reads it, rotary order included."""
    write_checkpoint(tmp_path, Shape(64, 96, 2, 4, 2, 128))
    write_tokenizer(tmp_path)
    write_gguf(tmp_path, tmp_path / "model.gguf")
    written = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).state_dict()
    read = LlamaForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf").state_dict()
    assert read.keys() == written.keys()
    for name, tensor in written.items():
        assert torch.equal(tensor.float(), read[name].float()), name
    assert AutoTokenizer.from_pretrained(tmp_path).decode([7, 127]) == "w7 w127"
    assert open_tokenizer(tmp_path).unk_token == "<unk>"  # ours opens it too


def test_a_tokenizer_that_is_there_stays(tmp_path):
    """Whoever measures a model of their own finds it as it was."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("theirs")
    prepare(tmp_path, print)
    assert (tmp_path / "tokenizer.json").read_text() == "theirs"
