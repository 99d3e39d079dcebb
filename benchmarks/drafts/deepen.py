"""A model of more layers that says what the smaller one says: its new layers add nothing.

usage: deepen.py MODEL OUT [--times N]

OUT has N times the layers of MODEL, a Llama: after its own come copies whose output projections are
zero. A pass costs N times as much, and MODEL drafts for it without an error: real costs, and the
worth of a draft model that is always right.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    """Write it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--times", type=int, default=3)
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model, trust_remote_code=False)
    layers = model.model.layers
    added = [copy.deepcopy(layer) for _ in range(args.times - 1) for layer in layers]
    with torch.no_grad():
        for layer in added:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    layers.extend(added)
    model.config.num_hidden_layers = len(layers)
    model.save_pretrained(args.out)
    AutoTokenizer.from_pretrained(args.model, trust_remote_code=False).save_pretrained(args.out)


if __name__ == "__main__":
    main()
