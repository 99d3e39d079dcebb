"""The suite's power: what is broken is caught by the check meant for it."""

from __future__ import annotations

import pytest
from broken_adapters import BROKEN_ADAPTERS
from broken_models import BROKEN_MODELS
from power import outcomes

BROKEN = [*BROKEN_ADAPTERS, *BROKEN_MODELS]


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.name)
def test_broken_is_caught(broken):
    """The check meant for it fails."""
    assert outcomes(broken.suite, [broken.check]) == {broken.check: "failed"}
