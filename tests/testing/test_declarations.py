"""Declarations of an adapter, checked on a tiny Llama."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ollm_adapter_llama import LlamaAdapter
from ollm_core import ConfigError, OllmError
from ollm_core.errors import PluginError
from ollm_core.testing import check_declarations, check_model, open_checkpoint, read_config


def test_declarations_are_checked_in_turn(tiny):
    """What is not what it is called is a PluginError, what the adapter refuses is its own error."""

    class NoLayout(LlamaAdapter):
        def layout(self, config):
            return None

    config, names = read_config(tiny), list(open_checkpoint(tiny).tensors)
    check_declarations(LlamaAdapter(), config, lambda text: names)
    with pytest.raises(PluginError, match="layout"):
        check_declarations(NoLayout(), config, lambda text: names)
    with pytest.raises(ConfigError):
        check_declarations(LlamaAdapter(), {**config, "hidden_size": -1}, lambda text: names)


def test_a_model_that_core_cannot_run():
    """The layout must lead to the modules of transformers' model."""
    config, layout = (
        LlamaAdapter().tiny_config(),
        LlamaAdapter().layout(LlamaAdapter().tiny_config()),
    )
    check_model(config, layout)
    with pytest.raises(OllmError, match=r"model\.nothing"):
        check_model(config, replace(layout, norm="model.nothing"))
