"""The conformance suite on the gpt-oss adapter, in both forms of checkpoints."""

from ollm_adapter_gpt_oss import GptOssAdapter
from ollm_conformance import AdapterConformance


class TestGptOss(AdapterConformance):
    """Packed as MXFP4, as it is published."""

    adapter = GptOssAdapter


class TestGptOssPlain(AdapterConformance):
    """Experts in the dtype of the rest."""

    adapter = GptOssAdapter
    tiny_config = {**GptOssAdapter().tiny_config(), "quantization_config": None}  # noqa: RUF012
