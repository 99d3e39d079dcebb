"""Make a mixture of experts out of a dense Llama: MoEfication (Zhang et al., 2022).

The neurons of each MLP that add most to it on the average become a shared expert, which every
token goes through; the others are clustered by their gate rows into experts of equal size, and a
linear router is fitted to say which of these matter for a hidden state. The result is a Qwen2-MoE
checkpoint whose routing depends on real text. It was not trained as a mixture: what its routers do
is no more than like what trained ones do.

    python benchmarks moefy models/smollm2-135M models/moefied --experts 32 --top-k 8
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2MoeConfig

from benchmarks import ROOT
from ollm_core import DecoderAdapter, ParameterSource, UnsupportedError
from ollm_core.contracts.model import Layout

CALIBRATION = ("README.md", "CONTRIBUTING.md", "LICENSE", "ollm_core/kv/disk/storage.py")
_FLAT = 1e-3  # the router's logits are made this small: the weights of what it chooses are equal
_ROUNDS = 12


class Qwen2Moe(DecoderAdapter):
    """Enough of the Qwen2-MoE family to open the result."""

    name = "qwen2-moe"
    model_types = ("qwen2_moe",)

    def layout(self, config: Any) -> Layout:
        return replace(super().layout(config), experts="mlp.experts")

    def layer_parameters(self, config: Any, layer_idx: int) -> Iterator[str]:
        yield from (f"self_attn.{name}_proj.weight" for name in "qkvo")
        yield from (f"self_attn.{name}_proj.bias" for name in "qkv")
        yield from ("input_layernorm.weight", "post_attention_layernorm.weight")
        yield from (f"mlp.shared_expert.{name}_proj.weight" for name in ("gate", "up", "down"))
        yield from ("mlp.shared_expert_gate.weight", "mlp.gate.weight")
        yield from ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")

    def experts(self, config: Any, parameter: str) -> Sequence[ParameterSource]:
        path, _, leaf = parameter.rpartition(".")
        if not path.endswith("mlp.experts"):
            return ()
        paths = [f"{path}.{i}" for i in range(config["num_experts"])]
        if leaf == "down_proj":
            return [ParameterSource((f"{one}.down_proj.weight",)) for one in paths]
        return [
            ParameterSource((f"{one}.gate_proj.weight", f"{one}.up_proj.weight"), _fused)
            for one in paths
        ]

    def tiny_config(self) -> Any:
        raise UnsupportedError("only what moefy.py makes is opened with this adapter")


def _fused(gate: Tensor, up: Tensor) -> Tensor:
    return torch.cat([gate, up])


def split_neurons(rows: Tensor, added: Tensor, num_shared: int, num_experts: int) -> list[Tensor]:
    """Neurons of the shared expert, those that added most; then of each expert: the rest clustered
    by the direction of their gate `rows` [F, C], as many in each.
    """
    order = added.argsort(descending=True)
    shared, rest = order[:num_shared].sort().values, order[num_shared:].sort().values
    unit = functional.normalize(rows[rest].float(), dim=1)
    generator = torch.Generator().manual_seed(0)
    centres = unit[torch.randperm(len(rest), generator=generator)[:num_experts]]
    for _ in range(_ROUNDS):
        cluster = [-1] * len(rest)
        room = [len(rest) // num_experts] * num_experts
        for pair in (unit @ centres.t()).flatten().argsort(descending=True).tolist():
            row, wanted = divmod(pair, num_experts)
            if room[wanted] and cluster[row] < 0:
                cluster[row] = wanted
                room[wanted] -= 1
        members = torch.tensor(cluster)
        centres = torch.stack([unit[members == i].mean(0) for i in range(num_experts)])
        centres = functional.normalize(centres, dim=1)
    return [shared, *(rest[members == i] for i in range(num_experts))]


def watch(model: Any, texts: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """What comes into each MLP [T, C], and the square of what each neuron then adds [T, F]."""
    seen: list[tuple[list[Tensor], list[Tensor]]] = [([], []) for _ in model.model.layers]

    def listen(i: int) -> Any:
        def told(mlp: Any, arguments: tuple[Tensor, ...]) -> None:
            states = arguments[0].flatten(0, 1)
            hidden = functional.silu(mlp.gate_proj(states)) * mlp.up_proj(states)
            seen[i][0].append(states)
            seen[i][1].append((hidden * mlp.down_proj.weight.norm(dim=0)) ** 2)

        return told

    hooks = [
        layer.mlp.register_forward_pre_hook(listen(i)) for i, layer in enumerate(model.model.layers)
    ]
    with torch.no_grad():
        for ids in texts:
            model(input_ids=ids[None], logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    return [(torch.cat(states), torch.cat(added)) for states, added in seen]


def fit_router(states: Tensor, added: Tensor, *, balanced: bool) -> Tensor:
    """Weights [E, C] that foretell from a state which clusters add most; `balanced` ones choose
    every cluster about as often, as trained routers are made to.
    """
    power = states.t() @ states
    power += 1e-3 * power.diagonal().mean() * torch.eye(len(power))

    def ridge(target: Tensor) -> Tensor:
        return torch.linalg.solve(power, states.t() @ target).t()

    if not balanced:
        return ridge(added)
    weight = ridge((added - added.mean(0)) / added.std(0))
    one = ridge(torch.ones(len(states), 1))
    weight = weight / (states @ weight.t()).std(0)[:, None]
    num_chosen = len(weight) // 4
    for _ in range(100):  # what is chosen too often is made less likely
        scores = states @ weight.t()
        chosen = torch.zeros_like(scores).scatter_(1, scores.topk(num_chosen).indices, 1)
        weight -= 0.5 * (chosen.mean(0)[:, None] - num_chosen / len(weight)) * one
    return weight


def write(model: Any, parts: Any, routers: Any, source: Path, out: Path, top_k: int) -> None:
    """The Qwen2-MoE checkpoint of it all."""
    out.mkdir(parents=True, exist_ok=True)
    keys = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
    keys += ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps")
    keys += ("rope_parameters", "tie_word_embeddings", "bos_token_id", "eos_token_id")
    mixture = Qwen2MoeConfig(
        **{key: getattr(model.config, key) for key in keys},
        shared_expert_intermediate_size=len(parts[0][0]),
        moe_intermediate_size=len(parts[0][1]),
        num_experts=len(parts[0]) - 1,
        num_experts_per_tok=top_k,
        norm_topk_prob=True,
        use_sliding_window=False,
    )
    mixture.architectures, mixture.dtype = ["Qwen2MoeForCausalLM"], torch.bfloat16
    mixture.save_pretrained(out)
    tensors = {n: t for n, t in model.state_dict().items() if ".mlp." not in n}
    tensors.pop("lm_head.weight")
    for i, layer in enumerate(model.model.layers):
        path, mlp = f"model.layers.{i}", layer.mlp
        for name in "qkv":
            rows = tensors[f"{path}.self_attn.{name}_proj.weight"].shape[0]
            tensors[f"{path}.self_attn.{name}_proj.bias"] = torch.zeros(rows)
        tensors[f"{path}.mlp.gate.weight"] = routers[i] * _FLAT
        tensors[f"{path}.mlp.shared_expert_gate.weight"] = torch.zeros(1, routers[i].shape[1])
        names = ["shared_expert", *(f"experts.{e}" for e in range(len(parts[i]) - 1))]
        scales = [2, *[top_k] * (len(parts[i]) - 1)]  # the shared gate is 1/2, the others 1/K
        for name, scale, rows in zip(names, scales, parts[i], strict=True):
            tensors[f"{path}.mlp.{name}.gate_proj.weight"] = mlp.gate_proj.weight[rows]
            tensors[f"{path}.mlp.{name}.up_proj.weight"] = mlp.up_proj.weight[rows]
            tensors[f"{path}.mlp.{name}.down_proj.weight"] = mlp.down_proj.weight[:, rows] * scale
    tensors = {n: t.detach().bfloat16().contiguous() for n, t in tensors.items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    for file in (*source.glob("tokenizer*"), *source.glob("*.jinja"), *source.glob("*.txt")):
        shutil.copy(file, out / file.name)


def loss_of(model: Any, ids: Tensor) -> float:
    """Mean loss of a text [T], in nats a token."""
    with torch.no_grad():
        logits = model(input_ids=ids[None]).logits[0, :-1].float()
    return functional.cross_entropy(logits, ids[1:]).item()


def main() -> None:
    """Write the checkpoint and say how good it is."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("dense", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--shared", type=int, default=512, help="neurons of the shared expert")
    parser.add_argument("--router", choices=("skewed", "balanced"), default="balanced")
    parser.add_argument("--tokens", type=int, default=1000, help="of each calibration text")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.dense, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(
        options.dense, dtype=torch.float32, trust_remote_code=False
    ).eval()

    def ids_of(path: Path) -> Tensor:
        return tokenizer(path.read_text(), return_tensors="pt").input_ids[0, : options.tokens]

    seen, parts, routers = [], [], []
    for layer, (states, added) in zip(
        model.model.layers, watch(model, [ids_of(ROOT / n) for n in CALIBRATION]), strict=True
    ):
        rows = layer.mlp.gate_proj.weight.detach()
        parts.append(split_neurons(rows, added.mean(0), options.shared, options.experts))
        groups = torch.stack([added[:, one].sum(-1).sqrt() for one in parts[-1][1:]], dim=1)
        routers.append(fit_router(states, groups, balanced=options.router == "balanced"))
        seen.append((states, groups))
    write(model, parts, routers, options.dense, options.out, options.top_k)
    shares, found = [], []
    for (states, added), router in zip(seen, routers, strict=True):
        chosen = (states @ router.t()).topk(options.top_k).indices
        best = added.topk(options.top_k).indices
        found.append((chosen[:, :, None] == best[:, None]).any(-1).float().mean().item())
        used = torch.bincount(chosen.flatten(), minlength=options.experts).float()
        shares.append((used.max() / used.mean()).item())
    test = ids_of(ROOT / "ollm_core" / "engine" / "engine.py")
    mixture = AutoModelForCausalLM.from_pretrained(
        options.out, dtype=torch.float32, experts_implementation="eager", trust_remote_code=False
    ).eval()
    report = {
        "experts": options.experts,
        "top_k": options.top_k,
        "shared_neurons": options.shared,
        "router": options.router,
        "chosen_among_best": sum(found) / len(found),
        "most_used_over_mean": sum(shares) / len(shares),
        "loss_dense": loss_of(model, test),
        "loss_mixture": loss_of(mixture, test),
    }
    (options.out / "moefied.json").write_text(json.dumps(report, indent=1))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
