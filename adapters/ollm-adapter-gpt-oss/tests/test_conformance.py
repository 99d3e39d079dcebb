"""The conformance suite on the gpt-oss adapter, in both forms of checkpoints."""

from types import MappingProxyType

from ollm_adapter_gpt_oss import GptOssAdapter
from ollm_conformance import AdapterConformance


class TestGptOss(AdapterConformance):
    """Packed as MXFP4, as it is published."""

    adapter = GptOssAdapter


class TestGptOssPlain(AdapterConformance):
    """Experts in the dtype of the rest: larger ones, as what lies between them is read with them
    where it is little.
    """

    adapter = GptOssAdapter
    tiny_config = MappingProxyType(
        {
            **GptOssAdapter().tiny_config(),
            "intermediate_size": 96,
            "num_local_experts": 5,
            "quantization_config": None,
        }
    )
