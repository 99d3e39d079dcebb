"""Adapters whose declarations do more than declare. In a module of their own, which imports nothing
else: what it imports, they import.
"""

from __future__ import annotations

from ollm_adapter_llama import LlamaAdapter


class PrintsWhenAsked(LlamaAdapter):
    def layout(self, config):
        print("looking at the layout")  # noqa: T201
        return super().layout(config)


class NeedsTorch(LlamaAdapter):
    def caches(self, config):
        import torch

        assert torch.__version__
        return super().caches(config)


class ChangesTransformers(LlamaAdapter):
    def layout(self, config):
        import sys

        modeling = sys.modules.get("transformers.models.llama.modeling_llama")
        if modeling:
            modeling.LlamaMLP = type("LlamaMLP", (modeling.LlamaMLP,), {})
        return super().layout(config)
