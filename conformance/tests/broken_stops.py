"""Texts that end in the wrong place. Each wraps `ollm.load`; the adapter is good."""

from __future__ import annotations

import functools

import torch
from broken import broken_adapter
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

import ollm
from ollm_adapter_llama import LlamaAdapter


def generating(change):
    """A load whose `generate` is `change(model, generate, ids, options)`."""

    @functools.wraps(change)
    def load(*args, **options):
        model = ollm.load(*args, **options)
        real = model.generate
        model.generate = lambda ids, **rest: change(model, real, ids, rest)
        return model

    return load


@generating
def first_stop_only(model, generate, ids, options):
    stops = options.get("eos_token_id")
    return generate(
        ids, **{**options, "eos_token_id": stops[0] if isinstance(stops, list) else stops}
    )


@generating
def smallest_stop_only(model, generate, ids, options):
    stops = options.get("eos_token_id")
    return generate(
        ids, **{**options, "eos_token_id": min(stops) if isinstance(stops, list) else stops}
    )


@generating
def largest_stop_only(model, generate, ids, options):
    stops = options.get("eos_token_id")
    return generate(
        ids, **{**options, "eos_token_id": max(stops) if isinstance(stops, list) else stops}
    )


@generating
def first_stop_ends_all_rows(model, generate, ids, options):
    found, stops = generate(ids, **options), options.get("eos_token_id")
    if not isinstance(stops, list):
        return found
    ends = torch.isin(found[:, ids.shape[1] :], torch.tensor(stops)).any(dim=0).nonzero()
    return found[:, : ids.shape[1] + int(ends[0]) + 1] if len(ends) else found


@generating
def rows_go_on_after_their_stop(model, generate, ids, options):
    """Until all have stopped."""
    found = generate(ids, **options)
    num_new = found.shape[1] - ids.shape[1]
    if len(ids) == 1:
        return found
    return generate(ids, **{**options, "eos_token_id": None, "max_new_tokens": num_new})


def one_stop_of_the_file(*args, **options):
    """Of a list in generation_config.json the first counts."""
    model = ollm.load(*args, **options)
    stops = model.generation_config.eos_token_id
    if isinstance(stops, list):
        model.generation_config.eos_token_id = stops[0]
    return model


def generation_config_not_read(*args, **options):
    """What config.json says of stops holds."""
    model = ollm.load(*args, **options)
    model.generation_config = GenerationConfig.from_model_config(model.config)
    return model


def stops_of_the_file_only(directory, **options):
    """Without generation_config.json a text does not end."""
    model = ollm.load(directory, **options)
    if not (directory / "generation_config.json").exists():
        model.generation_config.eos_token_id = None
    return model


class _AtTheEndOfAPass(StoppingCriteria):
    """Looks at the last token of a pass, and not at a draft."""

    def __init__(self, stops):
        self._stops = torch.tensor(stops).flatten()
        self.drafting = False

    def __call__(self, ids, scores, **_):
        return torch.isin(ids[:, -1], self._stops) & (not self.drafting)


@generating
def stops_looked_for_after_passes(model, generate, ids, options):
    drafter, stops = model._drafter, options.pop("eos_token_id", None)
    if drafter is None or stops is None:
        return generate(ids, eos_token_id=stops, **options)
    criterion, run = _AtTheEndOfAPass(stops), model.engine.run

    def draft(*asked):
        criterion.drafting = True
        return drafter(*asked)

    def check(store, work):
        criterion.drafting = False
        return run(store, work)

    model._drafter, model.engine.run = draft, check
    criteria = StoppingCriteriaList([criterion])
    try:
        return generate(ids, eos_token_id=None, stopping_criteria=criteria, **options)
    finally:
        model._drafter, model.engine.run = drafter, run


@generating
def stop_goes_into_the_cache(model, generate, ids, options):
    found, cache = generate(ids, **options), options.get("past_key_values")
    if cache is not None and len(found) == 1:
        model(input_ids=found[:, -1:], past_key_values=cache)
    return found


@generating
def drafts_stay_in_the_cache(model, generate, ids, options):
    """The guesses of the last pass that come after the stop."""
    found, cache = generate(ids, **options), options.get("past_key_values")
    if cache is not None and model._drafter is not None:
        draft = model._drafter(found[0], 3)
        if len(draft):
            model(input_ids=torch.cat([found[0, -1:], draft])[None], past_key_values=cache)
    return found


@generating
def drafts_are_finished(model, generate, ids, options):
    """`max_new_tokens` is looked at when a draft of four is done."""
    if model._drafter is not None:
        options["max_new_tokens"] = options["max_new_tokens"] // 4 * 4 + 4
    return generate(ids, **options)


def drafter_not_asked(*args, **options):
    model = ollm.load(*args, **options)
    model.draft_with = lambda drafter, num_draft_tokens=None: None
    return model


def _llama(check, sentence, load):
    return broken_adapter(check, sentence, LlamaAdapter, load=load)


BROKEN_STOPS = [
    _llama("language.stop-list", "Only the first stop token counts.", first_stop_only),
    _llama("language.stop-list", "Only the smallest stop token counts.", smallest_stop_only),
    _llama("language.stop-list", "Only the largest stop token counts.", largest_stop_only),
    _llama("language.stop-rows", "One row's stop ends all rows.", first_stop_ends_all_rows),
    _llama("language.stop-rows", "Rows go on after their stop.", rows_go_on_after_their_stop),
    _llama("language.stop-config", "One stop of the file counts.", one_stop_of_the_file),
    _llama(
        "language.stop-config",
        "generation_config.json is not read.",
        generation_config_not_read,
    ),
    _llama("language.stop-config", "config.json's stop is not known.", stops_of_the_file_only),
    _llama("drafts.stop", "Stops inside a draft are not seen.", stops_looked_for_after_passes),
    _llama("drafts.stop", "The stop token goes into the cache.", stop_goes_into_the_cache),
    _llama("drafts.stop", "Drafts past a stop stay in the cache.", drafts_stay_in_the_cache),
    _llama("drafts.stop", "Drafts go past max_new_tokens.", drafts_are_finished),
    _llama("drafts.stop", "The draft source is never asked.", drafter_not_asked),
]
