"""The conformance suite on one of the many architectures that the adapter opens."""

from ollm_adapter_transformers import TransformersAdapter
from ollm_conformance import AdapterConformance


class TestGpt2(AdapterConformance):
    """Learned positions, biases and a tied head."""

    adapter = TransformersAdapter
