"""Proves an oLLM adapter or part. A whole test file:

from ollm_conformance import AdapterConformance
from ollm_adapter_x import XAdapter

class TestX(AdapterConformance):
    adapter = XAdapter
"""

from ollm_conformance.adapter import AdapterConformance

__version__ = "0.1.0"

__all__ = ["AdapterConformance"]
