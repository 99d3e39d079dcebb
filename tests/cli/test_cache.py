"""`ollm cache`: what runs have kept is shown, verified and removed."""

import json


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
