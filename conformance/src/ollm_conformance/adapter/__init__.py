"""The checks of an adapter, in groups."""

from ollm_conformance.adapter.batches import Batches, Drafts
from ollm_conformance.adapter.caches import Caches
from ollm_conformance.adapter.declaration import Declaration
from ollm_conformance.adapter.exact import Exact
from ollm_conformance.adapter.language import Language
from ollm_conformance.adapter.memory import Memory
from ollm_conformance.adapter.robust import Failure, Isolation
from ollm_conformance.adapter.weights import Weights


class AdapterConformance(
    Declaration, Weights, Exact, Caches, Batches, Drafts, Memory, Isolation, Failure, Language
):
    """Every check of an adapter. Subclass it as `TestX` and set `adapter`."""


__all__ = ["AdapterConformance"]
