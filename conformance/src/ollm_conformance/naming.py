"""Names of parameters in a model, and names and shapes of tensors in its checkpoint."""

from __future__ import annotations

from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from ollm_conformance.forms import as_published
from ollm_conformance.subject import meta_model
from ollm_core import Config


def parameter_names(config: Config) -> list[str]:
    """Every parameter of the transformers model, a tied head included."""
    return [name for name, _ in meta_model(config).named_parameters(remove_duplicate=False)]


def stored_shapes(
    config: Config, model: PreTrainedModel | None = None
) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint as published: a tied head's is left out. `model` is that of
    `meta_model`, if there is one already.
    """
    model = model or meta_model(config)
    state = {name: p.data for name, p in model.named_parameters()}  # each shared one once
    state = as_published(config, revert_weight_conversion(model, state))
    return {name: tuple(tensor.shape) for name, tensor in state.items()}
