"""The checks of an adapter, in groups."""

import inspect

from ollm_conformance.adapter.asked import Asked
from ollm_conformance.adapter.batches import Batches, Drafts
from ollm_conformance.adapter.caches import Caches
from ollm_conformance.adapter.claimed import Claimed
from ollm_conformance.adapter.configs import Configs
from ollm_conformance.adapter.declaration import Declaration
from ollm_conformance.adapter.drawn import Drawn
from ollm_conformance.adapter.exact import Exact
from ollm_conformance.adapter.experts import Experts
from ollm_conformance.adapter.failures import BatchFailure
from ollm_conformance.adapter.foreign import Foreign
from ollm_conformance.adapter.generation import Stops
from ollm_conformance.adapter.hardware import Gpu, Speed
from ollm_conformance.adapter.hidden import Hidden
from ollm_conformance.adapter.kept import KeptKV
from ollm_conformance.adapter.language import Language
from ollm_conformance.adapter.memory import Memory
from ollm_conformance.adapter.packed import Numbers
from ollm_conformance.adapter.picked import Picked
from ollm_conformance.adapter.planned import Planned
from ollm_conformance.adapter.precision import Precision
from ollm_conformance.adapter.released import Released
from ollm_conformance.adapter.resumed import Resumed
from ollm_conformance.adapter.robust import Failure, Isolation
from ollm_conformance.adapter.sampled import Sampled
from ollm_conformance.adapter.serving import Serving
from ollm_conformance.adapter.sizes import Sizes
from ollm_conformance.adapter.stored import Stored
from ollm_conformance.adapter.stray import Stray
from ollm_conformance.adapter.unstated import Unstated
from ollm_conformance.adapter.varied import Varied
from ollm_conformance.adapter.walks import Walks
from ollm_conformance.adapter.weights import Weights
from ollm_conformance.checks import MARK, Check


class AdapterConformance(
    Declaration,
    Claimed,
    Stored,
    Weights,
    Configs,
    Unstated,
    Stray,
    Varied,
    Drawn,
    Numbers,
    Foreign,
    Exact,
    Asked,
    Precision,
    Sizes,
    Caches,
    KeptKV,
    Released,
    Batches,
    Picked,
    Drafts,
    Serving,
    Sampled,
    Experts,
    Memory,
    Hidden,
    Planned,
    Isolation,
    Failure,
    BatchFailure,
    Resumed,
    Language,
    Stops,
    Walks,
    Gpu,
    Speed,
):
    """Every check of an adapter. Subclass it as `TestX` and set `adapter`."""


def adapter_checks() -> list[Check]:
    """Every check of an adapter, sorted by id."""
    marks = [getattr(test, "pytestmark", []) for _, test in inspect.getmembers(AdapterConformance)]
    checks = [mark.args[0] for found in marks for mark in found if mark.name == MARK]
    return sorted(checks, key=lambda check: check.id)


__all__ = ["AdapterConformance", "adapter_checks"]
