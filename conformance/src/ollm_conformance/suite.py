"""The suite for an installed adapter: `pytest --pyargs ollm_conformance.suite --ollm-adapter
NAME`.
"""

from ollm_conformance.adapter import AdapterConformance


class TestAdapter(AdapterConformance):
    """Takes the adapter from the command line."""
