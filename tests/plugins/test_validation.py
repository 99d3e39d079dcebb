"""What adapters declare, when a model is opened: a mistake is one line, not an error of core's."""

from __future__ import annotations

from dataclasses import replace

import pytest

import ollm
from ollm_adapter_llama import LlamaAdapter
from ollm_core import CAPABILITIES, ConfigError, ParameterSource
from ollm_core.errors import PluginError
from ollm_core.plugins.registry import Registry
from ollm_core.plugins.validation import check_capability, kinds_of, layout_of

LLAMA = LlamaAdapter()


def absent_key(self, config):
    return config["no_such_key"]


def no_tensor_has_that(self, config, parameter):
    return ParameterSource((parameter,), (lambda t: t.nope()) if "q_proj" in parameter else None)


MISTAKES = {
    "text_config": (lambda self, config: None, "text_config() must return a part of config.json"),
    "layout": (lambda self, config: None, "layout() must return a Layout, got None"),
    "weights": (lambda self, config, names: None, "weights() must return a WeightPlan, got None"),
    "caches": (lambda self, config: [None] * 2, "caches() must return a sequence of CacheKind"),
    "layer_types": (absent_key, "layout() raised KeyError: 'no_such_key'. hint: this is a fault"),
    "source": (no_tensor_has_that, "q_proj.weight: its transform, given ["),
}


@pytest.mark.parametrize("method", MISTAKES)
def test_a_mistake_is_a_plugin_error(tiny, ids, method):
    """One line that names the method, from opening or from the first pass; never a traceback's."""
    replaced, words = MISTAKES[method]
    mistaken = type("Mistaken", (LlamaAdapter,), {method: replaced})
    with (
        pytest.raises(PluginError) as refused,
        ollm.load(tiny, device="cpu", registry=Registry.of(mistaken())) as model,
    ):
        model(input_ids=ids(8)[None])
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_path_that_leads_nowhere(tiny):
    """A misspelled path of the layout is answered with the one that was meant."""
    elsewhere = {"layout": lambda self, config: replace(LLAMA.layout(config), norm="model.nrom")}
    registry = Registry.of(type("Mistaken", (LlamaAdapter,), elsewhere)())
    with pytest.raises(PluginError, match=r"norm is 'model\.nrom'.* mean 'model\.norm'\?"):
        ollm.load(tiny, device="cpu", registry=registry)


def test_mixers_and_caches_go_with_layers():
    """Another number of either is named, with what gives it."""
    config = LLAMA.tiny_config()
    layout = layout_of(LLAMA, config)
    assert len(kinds_of(LLAMA, config, layout)) == layout.num_layers
    with pytest.raises(ConfigError, match=r"gives 3 caches, expected 4.*caches\(\) must"):
        kinds_of(LLAMA, config, replace(layout, num_layers=4))
    with pytest.raises(ConfigError, match=r"gives 1 mixers for 3 layers"):
        kinds_of(LLAMA, config, replace(layout, mixers=("full",)))


@pytest.mark.parametrize(("name", "meant"), [("dratfs", "drafts"), ("kv-disc", "kv-disk")])
def test_a_misspelled_capability_is_answered(name, meant):
    """With the near one, and with all that there are."""
    with pytest.raises(PluginError) as refused:
        check_capability("x", name)
    assert refused.value.hint.startswith(f"did you mean '{meant}'? there are ")
    assert all(one in refused.value.hint for one in CAPABILITIES)
    for known in CAPABILITIES:
        check_capability("x", known)
