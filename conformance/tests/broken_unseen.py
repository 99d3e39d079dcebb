"""Mutants that were unseen once, with the check that catches each now."""

from __future__ import annotations

from broken import Broken
from unseen_a import UNSEEN as FIRST_ROUND
from unseen_b import UNSEEN as SECOND_ROUND
from unseen_c import UNSEEN as THIRD_ROUND
from unseen_d import UNSEEN as FOURTH_ROUND

CAUGHT_BY = {
    "BelievesWindows": "configs.stray-keys",
    "ClampsWindows": "configs.windows",
    "CopiesInFloat": "weights.scratch",
    "DropsBiases": "weights.swallowed",
    "DropsFurtherLayers": "weights.swallowed",
    "EightHeadsUnlessSaid": "configs.unstated",
    "ExpertsByTheirNames": "experts.many",
    "FurtherTokenIsForeign": "weights.superfluous",
    "FusedInFloat32": "weights.scratch",
    "HottestExpertsFirst": "weight-streamer.experts",
    "KnowsNoOldRope": "configs.unstated",
    "KnowsOneKeyOfExperts": "configs.unstated",
    "LeavesNullsOut": "configs.nulls",
    "LetsLongropeIn": "configs.rope-types",
    "LetsWindowsAlternate": "configs.windows",
    "ListedTypesNotRead": "configs.windows",
    "ListsPackedAsHalves": "declaration.stored-bytes",
    "OneFlagForAllBiases": "weights.flags",
    "OneFlagForBiases": "weights.flags",
    "OnlyAWholeDraftIsLookedAtForTheEnd": "walk.rows",
    "OnlyNewTokensAreCounted": "exact.last-position",
    "PaddedEndsNotRefused": "batches.padded-ends",
    "PlansTheTiedHead": "declaration.stored-tensors",
    "PositionsLeftOut": "configs.unstated",
    "RemembersKinds": "configs.windows",
    "RowsRepeatedAsAWhole": "caches.fork",
    "SparseStepNotRead": "configs.dense-layers",
    "StateInTheModelsDtype": "caches.kinds",
    "StatesInHalf": "caches.kinds",
    "StrayBiasesIgnored": "weights.swallowed",
    "StrayWindowBelieved": "configs.stray-keys",
    "TakesPackedStacksForSquare": "configs.small",
    "TextConfigWithoutTheWhole": "configs.whole",
    "TiedHeadCountedTwice": "declaration.catalog",
    "TiedOutsideTheText": "configs.whole",
    "TiesWhatIsLost": "weights.tied-head",
    "TurnsWindowsOn": "configs.windows",
    "WantsTheEmbeddingsName": "weights.tied-head",
    "WholePromptsAreRestored": "walk.rows",
    "WindowAsPublished": "caches.kinds",
    "WindowsBeginEarlier": "configs.windows",
    "beams_change_places_one_by_one": "caches.released",
    "busiest_expert_first": "failure.read-error",
    "caches_left_open": "memory.freed",
    "caches_outlive_the_model": "memory.freed",
    "checks_the_first_block_of_a_read": "walk.damage",
    "compares_the_start_of_each_block": "caches.other-prompt",
    "convolution_stays_ahead": "failure.batch-cancelled",
    "drafts_past_the_end": "walk.rows",
    "ends_by_config_alone": "language.stop-config",
    "finds_out_when_it_gets_there": "memory.generate",
    "forgets_when_the_window_is_just_full": "exact.window-edges",
    "forks_do_not_own_windows": "memory.sequences",
    "forks_share_their_states": "walk.sequences",
    "frees_blocks_twice": "caches.released",
    "hands_out_nan": "failure.not-finite",
    "items_of_all_batches_not_counted": "walk.rows",
    "kept_by_config_alone": "caches.other-weights",
    "knows_models_by_weights_alone": "caches.other-weights",
    "last_position_refused": "exact.last-position",
    "looks_at_the_first_file": "failure.overwritten",
    "mask_read_where_rows_begin": "batches.right-padded",
    "options_stay_for_the_next_call": "language.stop",
    "passes_draw_a_number": "isolation.random-state",
    "remembers_embedding_rows": "memory.plan",
    "remembers_the_angles_of_the_first_row": "batches.left-padded",
    "reorders_beams_in_place": "caches.released",
    "short_prompts_lie_on_the_left": "exact.short-passes",
    "stays_reserved_after_failure": "failure.read-error",
    "stops_at_the_first_stop_token": "language.stop-config",
    "tails_not_accounted": "caches.released",
    "takes_padding_to_be_on_the_left": "batches.right-padded",
    "three_rows_have_one_past": "batches.left-padded",
    "unseals_nothing_on_disk": "drafts.verify",
    "usual_scale_of_one_token": "exact.long",
}

BROKEN_UNSEEN = [
    Broken(one.name, one.sentence, one.suite, CAUGHT_BY[one.name])
    for one in [*FIRST_ROUND, *SECOND_ROUND, *THIRD_ROUND, *FOURTH_ROUND]
    if one.name in CAUGHT_BY
]
