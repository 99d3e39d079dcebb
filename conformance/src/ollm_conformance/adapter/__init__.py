"""The checks of an adapter, in groups."""

from ollm_conformance.adapter.declaration import Declaration


class AdapterConformance(Declaration):
    """Every check of an adapter. Subclass it as `TestX` and set `adapter`."""


__all__ = ["AdapterConformance"]
