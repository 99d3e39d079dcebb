"""What a plugin may implement. One entry point in the group `ollm.adapters` names the plugin
module.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from ollm_core.interfaces import ModelAdapter

PROJECT = "ollm"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def ollm_adapters() -> Sequence[ModelAdapter]:
    """Model adapters that this plugin offers. Called once; must not import torch."""
    return ()
