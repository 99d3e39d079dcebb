"""The conformance suite on the Llama adapter."""

from pathlib import Path

from ollm_adapter_llama import LlamaAdapter
from ollm_conformance import AdapterConformance


class TestLlama(AdapterConformance):
    """With SmolLM2's tokenizer, which `make model` brings."""

    adapter = LlamaAdapter
    checkpoint = Path(__file__).parents[3] / "models/smollm2-135M"
