"""The conformance suite on every adapter of this distribution."""

from ollm_adapter_qwen3_next import (
    Qwen3MoeAdapter,
    Qwen3NextAdapter,
    Qwen35Adapter,
    Qwen35MoeAdapter,
)
from ollm_conformance import AdapterConformance


class TestQwen3Next(AdapterConformance):
    """Gated DeltaNet, gated attention, routed and shared experts."""

    adapter = Qwen3NextAdapter


class TestQwen3Moe(AdapterConformance):
    """Attention and routed experts."""

    adapter = Qwen3MoeAdapter


class TestQwen35Moe(AdapterConformance):
    """As Qwen3-Next, with other projections."""

    adapter = Qwen35MoeAdapter


class TestQwen35(AdapterConformance):
    """The same without experts."""

    adapter = Qwen35Adapter
