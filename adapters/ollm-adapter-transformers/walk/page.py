"""Writes the page of what was tried, out of the results by model type."""

from __future__ import annotations

from collections.abc import Mapping

_HEAD = """# Models

Every causal model type of transformers {version}, tried by `ollm-adapter-transformers` on a tiny
random model against transformers' own run with the same chunks, by `make models`. Bit for bit, in
float32 and bfloat16: a prompt and four tokens after it (`logits`), the same for two rows (`batch`),
and with the prompt in chunks and keys and values on disk (`chunks`). In float32 also greedy
`generate` (`greedy`), and whether config.json alone tells what the checkpoint holds (`plan`).
Where transformers' layers begin anew with each call of several tokens, its result in chunks is not
that of the whole prompt: there the prompt goes token by token (`tokens`), as when decoding, and a
longer chunk is refused with that reason.
A family adapter, where one is installed, opens its types in place of this one.
"""


def page(results: Mapping[str, Mapping[str, str]], version: str) -> str:
    """Markdown."""
    told = {one: outcome(result) for one, result in results.items()}
    counts = {
        kind: sum(kind == found for found, _ in told.values())
        for kind in ("passes", "partly", "refused", "not tried", "fails")
    }
    total = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    lines = [_HEAD.format(version=version).rstrip(), "", f"Of {len(told)}: {total}.", ""]
    lines += ["| model type | | |", "| --- | --- | --- |"]
    for model_type, (kind, reason) in sorted(told.items()):
        lines.append(f"| `{model_type}` | {kind} | {reason.replace('|', '/')} |")
    return "\n".join(lines) + "\n"


def outcome(result: Mapping[str, str]) -> tuple[str, str]:
    """passes, partly, refused or fails, and why."""
    if "refused" in result:
        return "refused", result["refused"]
    if "untried" in result:
        return "not tried", result["untried"]
    if "failed" in result:
        return "fails", result["failed"]
    wrong = {name: told for name, told in result.items() if told}
    if not wrong:
        by_token = any(name.startswith("tokens ") for name in result)
        return "passes", "all checks; chunks of one token" if by_token else "all checks"
    if all(told.startswith("refused: ") for told in wrong.values()):
        return "partly", "; ".join(f"{name}: {told}" for name, told in wrong.items())
    return "fails", "; ".join(f"{name}: {told}" for name, told in wrong.items())
