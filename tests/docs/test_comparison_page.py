"""docs/comparison.md has the numbers of the records that it names, and no others."""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/comparison.md").read_text()
SECTIONS = dict(part.split("\n", 1) for part in PAGE.split("\n## ")[1:])


def records(section):
    """Those that a section links, in its order."""
    names = re.findall(r"\]\(\.\./(benchmarks/results/[\w.-]+\.json)\)", SECTIONS[section])
    return [json.loads((ROOT / name).read_text()) for name in names]


def rows(section):
    """Its table's, without the heading."""
    cells = [
        line.strip("| ").split(" | ") for line in SECTIONS[section].splitlines() if line[:1] == "|"
    ]
    return {name: values for name, *values in cells[2:]}


def test_decoding():
    """Every program of the record with every round, and the conditions."""
    section = "Decoding a model larger than memory"
    (told,), found = records(section), rows(section)
    assert found.keys() == set(told["titles"].values())
    keys = {"decode_tok_s": "{:.2f}", "prefill_s": "{:.1f}", "read_mb_per_pass": "{:,.0f}",
            "peak_anon_mb": "{:,.0f}"}  # fmt: skip
    for name, title in told["titles"].items():
        for cell, (key, form) in zip(found[title], keys.items(), strict=True):
            rounds = ", ".join(form.format(one[key]) for one in told["runs"][name])
            assert cell.removesuffix(" MB") == rounds, (name, key)
    text = " ".join(SECTIONS[section].split())
    bounds = told["bounds"]
    for said in (
        f"{told['weight_bytes'] / 1e9:.2f} GB", f"{told['cap_mib']:,} MiB", told["date"],
        f"{told['prompt_tokens']} prompt tokens", f"{bounds['nothing_kept_tok_s']:.2f} tokens/s",
        f"and {bounds['cap_full_tok_s']:.2f} with", "two cores",
    ):  # fmt: skip
        assert said in text, said
    assert told["machine"]["cores"] == 2
    assert not any(told["other_tokens"])


def test_prefill():
    """Each length of both records: all instructions, then AVX2 alone, every round."""
    told, found = records("Prefill"), rows("Prefill")
    assert [one["avx2"] for one in told] == [False, True]
    lengths = told[0]["prompts"].keys()
    expected = {
        f"{int(length):,}": [
            ", ".join(f"{run['prefill_s']:.1f}" for run in runs) + " s"
            for one in told
            for runs in one["prompts"][length]["runs"].values()
        ]
        for length in lengths
    }
    assert found == expected
    assert all(one["prompts"].keys() == lengths for one in told)
    assert all(
        next(iter(length["runs"])) == "ollm-core"
        for one in told
        for length in one["prompts"].values()
    )
