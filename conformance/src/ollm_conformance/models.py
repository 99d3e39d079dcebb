"""The transformers model of a config.json: without data, or random and written as published."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ollm_conformance.forms import as_published
from ollm_conformance.seeds import drawn, run_seed
from ollm_core import Config

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_LOUD, _QUIET = 1.0, 0.3  # a layer adds numbers of about the size of 1
_SPREAD = 0.2
_WIDE, _LIKE = 192, 64
"""Rows of more weights than the first have smaller ones, so that their sums are as large as those
of the second. Else attention is the sharper the wider a model is, and after ten layers a rounding
error is as large as what is wrong.
"""


def model_config(config: Config) -> Any:
    """The transformers configuration object of a config.json."""
    return AutoConfig.for_model(**copy.deepcopy(dict(config)))


def text_view(config: Config) -> dict[str, Any]:
    """The text of a config.json as transformers' config class tells it, absent keys filled in."""
    told: dict[str, Any] = model_config(config).get_text_config().to_dict()
    return told


def _plain_model(config: Config) -> PreTrainedModel:
    known = model_config(config)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(known, trust_remote_code=False)
    return model


def meta_model(config: Config) -> PreTrainedModel:
    """The transformers model of a config.json, without data."""
    with torch.device("meta"):
        return _plain_model(config)


def random_model(config: Config) -> PreTrainedModel:
    """The transformers model of a config.json in float32, every parameter random.

    Norms, biases and sinks too: one that is dropped or swapped must show. Logits are peaked, so
    that the greedy token is rarely near a tie.
    """
    torch.manual_seed(run_seed())
    model: PreTrainedModel = _plain_model(config).float().eval()
    generator = drawn(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                width = parameter.shape[-1]
                narrower = 1.0 if width <= _WIDE else (_LIKE / width) ** 0.5
                parameter.copy_(noise * _SPREAD * narrower)
            else:
                parameter.add_(noise * _SPREAD)
        _quieten_tied_rows(model)
    return model


def _quieten_tied_rows(model: PreTrainedModel) -> None:
    """Make the rows of a tied embedding smaller where the model multiplies them so much that its
    head would say the last token again, whatever the layers do.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or head.weight is not embedding.weight:
        return
    hidden = model(torch.arange(2)[None], output_hidden_states=True).hidden_states
    size = float(hidden[0].square().mean().sqrt())  # of a number of what the first layer is given
    if size > _LOUD:
        embedding.weight.mul_(_QUIET / size)


def write_random(directory: Path, config: Config, dtype: str, *, shards: bool = False) -> None:
    """What transformers writes of a random model, in several files or one."""
    model = random_model(config)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(DTYPES[dtype])
    model.config.dtype = DTYPES[dtype]
    num_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    model.save_pretrained(
        directory,
        state_dict=as_published(config, model.state_dict()),
        max_shard_size=num_bytes // 5 if shards else "5GB",
    )
