"""Mutants that were unseen once, with the check that catches each now."""

from __future__ import annotations

from broken import Broken
from unseen_a import UNSEEN as FIRST_ROUND

CAUGHT_BY = {
    "ClampsWindows": "configs.windows",
    "CopiesInFloat": "memory.plan",
    "DropsBiases": "weights.swallowed",
    "DropsFurtherLayers": "weights.swallowed",
    "EightHeadsUnlessSaid": "configs.unstated",
    "KnowsNoOldRope": "configs.unstated",
    "KnowsOneKeyOfExperts": "configs.unstated",
    "LeavesNullsOut": "configs.nulls",
    "LetsLongropeIn": "configs.rope-types",
    "LetsWindowsAlternate": "configs.windows",
    "ListsPackedAsHalves": "declaration.stored-bytes",
    "OneFlagForBiases": "weights.flags",
    "PlansTheTiedHead": "declaration.stored-tensors",
    "RemembersKinds": "configs.windows",
    "StatesInHalf": "caches.kinds",
    "TakesPackedStacksForSquare": "configs.small",
    "TiesWhatIsLost": "weights.tied-head",
    "TurnsWindowsOn": "configs.windows",
    "WantsTheEmbeddingsName": "weights.tied-head",
}

BROKEN_UNSEEN = [
    Broken(one.name, one.sentence, one.suite, CAUGHT_BY[one.name])
    for one in FIRST_ROUND
    if one.name in CAUGHT_BY
]
