"""Compare ways to choose which experts stay in memory, on recorded traces.

    python benchmarks expert_policies TRACE.json... --json FILE

Each expert that a layer asks for in a pass is found or read. `even` keeps the first experts of each
layer, whatever is asked; `lru` the last asked; `lfu` those with the largest share of their layer's
tokens, decayed; a newcomer must beat the victim by a margin. `best` knows the future (Belady, with
the right not to keep): no policy reads less. `adaptive` is the code that oLLM runs.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ollm_core.weights.experts.policy import ExpertShares, ExpertTier

Expert = tuple[int, int]
SHARES = (0.1, 0.25, 0.5, 0.75)


class Policy(Protocol):
    """Says which experts of a layer are kept already, and then keeps others or does not."""

    num_copied: int

    def ask(self, layer_idx: int, counts: Mapping[int, int]) -> int:
        """How many of those asked for were kept."""


class Even:
    """The first of each layer, for ever."""

    def __init__(self, num_experts: Mapping[int, int], capacity: int) -> None:
        order = [
            (i, e)
            for e in range(max(num_experts.values()))
            for i, n in num_experts.items()
            if e < n
        ]
        self._kept = set(order[:capacity])
        self._there: set[Expert] = set()
        self.num_copied = 0

    def ask(self, layer_idx: int, counts: Mapping[int, int]) -> int:
        asked = {(layer_idx, e) for e in counts}
        found = len(asked & self._there)
        new = (asked & self._kept) - self._there
        self._there |= new
        self.num_copied += len(new)
        return found


class Lru:
    """The last ones asked, of all layers."""

    def __init__(self, num_experts: Mapping[int, int], capacity: int) -> None:
        self._kept: OrderedDict[Expert, None] = OrderedDict()
        self._capacity = capacity
        self.num_copied = 0

    def ask(self, layer_idx: int, counts: Mapping[int, int]) -> int:
        found = 0
        for e in sorted(counts):
            if (layer_idx, e) in self._kept:
                found += 1
                self._kept.move_to_end((layer_idx, e))
                continue
            self._kept[layer_idx, e] = None
            self.num_copied += 1
            if len(self._kept) > self._capacity:
                self._kept.popitem(last=False)
        return found


class PerLayer:
    """Another policy for each layer, with an equal part of the room."""

    def __init__(self, num_experts: Mapping[int, int], capacity: int, make: Any) -> None:
        parts = len(num_experts)
        self._of = {
            i: make({i: n}, capacity // parts + (k < capacity % parts))
            for k, (i, n) in enumerate(num_experts.items())
        }

    @property
    def num_copied(self) -> int:
        return sum(policy.num_copied for policy in self._of.values())

    def ask(self, layer_idx: int, counts: Mapping[int, int]) -> int:
        found: int = self._of[layer_idx].ask(layer_idx, counts)
        return found


class Lfu:
    """Those with the largest share of their layer's tokens, which is forgotten by and by."""

    def __init__(
        self,
        num_experts: Mapping[int, int],
        capacity: int,
        half_life: float = 8,
        margin: float = 1.25,
        *,
        by_tokens: bool = True,
    ) -> None:
        self._share = {i: [1 / n] * n for i, n in num_experts.items()}
        self._capacity = capacity
        self._half_life, self._margin, self._by_tokens = half_life, margin, by_tokens
        self._kept: set[Expert] = set()
        self.num_copied = 0

    def ask(self, layer_idx: int, counts: Mapping[int, int]) -> int:
        shares = self._share[layer_idx]
        if not self._by_tokens:
            counts = dict.fromkeys(counts, 1)
        total = sum(counts.values())
        keep = 0.5 ** (total / (self._half_life * len(shares)))
        shares[:] = [s * keep for s in shares]
        for e, count in counts.items():
            shares[e] += (1 - keep) * count / total
        asked = {(layer_idx, e) for e in counts}
        found = len(asked & self._kept)
        new = sorted(asked - self._kept, key=self._weight, reverse=True)
        room = self._capacity - len(self._kept)
        self._kept.update(new[:room])
        self.num_copied += len(new[:room])
        if new[room:]:
            out = sorted(self._kept - asked, key=self._weight)
            for one, other in zip(new[room:], out, strict=False):
                if self._weight(one) <= self._margin * self._weight(other):
                    break
                self._kept.remove(other)
                self._kept.add(one)
                self.num_copied += 1
        return found

    def _weight(self, expert: Expert) -> float:
        return self._share[expert[0]][expert[1]]


class Adaptive:
    """The code that oLLM runs. It also counts what a guess would find: the experts that the layer
    had to read for the token before, if they are not kept yet.
    """

    def __init__(self, num_experts: Mapping[int, int], capacity: int) -> None:
        self._shares = ExpertShares(num_experts)
        self._tier: ExpertTier[None] = ExpertTier(self._shares)
        self._tier.resize(capacity)
        self._read: dict[int, set[int]] = defaultdict(set)
        self.num_copied = self.guessed = self.guessed_right = self.missing = 0

    def ask(self, layer_idx: int, counts: Mapping[int, int]) -> int:
        self._shares.note(layer_idx, counts)
        new = [e for e in counts if (layer_idx, e) not in self._tier]
        if sum(counts.values()) == len(counts):  # one token: a decode step
            guess = {e for e in self._read[layer_idx] if (layer_idx, e) not in self._tier}
            self.guessed += len(guess)
            self.guessed_right += len(guess & set(new))
            self.missing += len(new)
            self._read[layer_idx] = set(new)
        plan = self._tier.plan(layer_idx, counts, new)
        self.num_copied += len(plan)
        for e, goes in plan.items():
            if goes is not None:
                self._tier.pop(goes)
            self._tier.put((layer_idx, e), None)
        return len(counts) - len(new)


@dataclass
class Result:
    """What a policy did, in prompts and in decoding."""

    prompt_hit: float
    decode_hit: float
    copied_per_read: float


def replay(passes: Sequence[Any], policy: Policy) -> Result:
    """Run a trace through a policy."""
    hit, asked = [0, 0], [0, 0]
    for one in passes:
        decode = one["tokens"] == 1
        for layer_idx, counts in one["layers"].items():
            hit[decode] += policy.ask(int(layer_idx), {int(e): n for e, n in counts.items()})
            asked[decode] += len(counts)
    read = sum(asked) - sum(hit)
    return Result(hit[0] / asked[0], hit[1] / asked[1], policy.num_copied / max(read, 1))


def best(passes: Sequence[Any], capacity: int) -> Result:
    """Knows the future: of what is kept and what comes, that goes which is asked for last."""
    later: dict[Expert, list[int]] = defaultdict(list)
    asks = [
        (one["tokens"] == 1, [(int(i), int(e)) for e in counts])
        for one in passes
        for i, counts in one["layers"].items()
    ]
    for when, (_, experts) in enumerate(asks):
        for expert in experts:
            later[expert].append(when)
    for times in later.values():
        times.reverse()
    kept: dict[Expert, float] = {}
    hit, asked, copied = [0, 0], [0, 0], 0
    for decode, experts in asks:
        found = [expert for expert in experts if expert in kept]
        hit[decode] += len(found)
        asked[decode] += len(experts)
        came = set(experts)
        for expert in experts:
            later[expert].pop()
            kept[expert] = later[expert][-1] if later[expert] else float("inf")
        for expert in sorted(kept, key=kept.__getitem__)[capacity:]:
            del kept[expert]
            came.discard(expert)
        copied += len(came - set(found))
    read = sum(asked) - sum(hit)
    return Result(hit[0] / asked[0], hit[1] / asked[1], copied / max(read, 1))


def recurrence(passes: Sequence[Any]) -> float:
    """How many of the experts that a layer wants for a token it wanted for the token before."""
    again = asked = 0
    for before, now in itertools.pairwise(passes):
        if now["tokens"] == before["tokens"] == 1 and now["text"] == before["text"]:
            for layer_idx, counts in now["layers"].items():
                again += len(counts.keys() & before["layers"][layer_idx].keys())
                asked += len(counts)
    return again / asked


POLICIES: dict[str, Callable[[Mapping[int, int], int], Policy]] = {
    "even": Even,
    "lru": Lru,
    "lru per layer": lambda n, c: PerLayer(n, c, Lru),
}
for _half_life in (2, 8, 32, 128):
    POLICIES[f"lfu {_half_life}"] = functools.partial(Lfu, half_life=_half_life)
for _margin in (1.0, 2.0):
    POLICIES[f"lfu 8 margin {_margin}"] = functools.partial(Lfu, margin=_margin)
POLICIES["lfu 8 by passes"] = functools.partial(Lfu, by_tokens=False)
POLICIES["lfu 8 per layer"] = lambda n, c: PerLayer(n, c, Lfu)


def compare(trace: Any) -> dict[str, Any]:
    """All policies at all sizes on one trace."""
    num_experts = {int(i): n for i, n in trace["experts"].items()}
    passes, total = trace["passes"], sum(num_experts.values())
    table: dict[str, Any] = {name: {} for name in (*POLICIES, "adaptive", "best")}
    guesses = {}
    for share in SHARES:
        capacity = round(share * total)
        for name, make in POLICIES.items():
            table[name][share] = replay(passes, make(num_experts, capacity)).__dict__
        adaptive = Adaptive(num_experts, capacity)
        table["adaptive"][share] = replay(passes, adaptive).__dict__
        guesses[share] = {
            "right": adaptive.guessed_right / max(adaptive.guessed, 1),
            "of_missing": adaptive.guessed_right / max(adaptive.missing, 1),
        }
        table["best"][share] = best(passes, capacity).__dict__
    return {
        "model": trace["model"],
        "texts": trace["texts"],
        "num_passes": len(passes),
        "num_experts": total,
        "experts_of_last_token": recurrence(passes),
        "guess_last_token_reads": guesses,
        "policies": table,
    }


def main() -> None:
    """Print a table for each trace: hits in prompts and in decoding, copies for each read."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("traces", nargs="+", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = [compare(json.loads(path.read_text())) for path in options.traces]
    for one in found:
        print(f"{one['model']}: last token's experts again: {one['experts_of_last_token']:.1%}")
        print(f"{'':20}" + "".join(f"{share:>22.0%}" for share in SHARES))
        for name, row in one["policies"].items():
            cells = (
                f"{r['prompt_hit']:7.1%}{r['decode_hit']:7.1%}{r['copied_per_read']:8.3f}"
                for r in row.values()
            )
            print(f"{name:20}" + "".join(cells))
        for what, text in (("right", "guesses right"), ("of_missing", "of the reads")):
            row = one["guess_last_token_reads"].values()
            print(f"{text:20}" + "".join(f"{r[what]:14.1%}{'':8}" for r in row))
    if options.json:
        rounded = json.loads(
            json.dumps({"traces": found}), parse_float=lambda x: round(float(x), 4)
        )
        options.json.write_text(json.dumps(rounded, indent=1) + "\n")


if __name__ == "__main__":
    main()
