"""What is told before a long run."""

from __future__ import annotations

import json
import re

from ollm_core.calibration import rates
from ollm_core.cli.forecast import forecast, forecasts_of
from ollm_core.cli.output import format_time


def test_a_long_prompt_is_told(smollm2):
    """By the plan: seconds to read it, and of each pass."""
    options = {"device": "cpu", "device_memory": "200MB", "precision": "fast"}
    told = forecast(str(smollm2), options, 7000, 64)
    rest = r"[\d.]+ s for each pass that makes tokens(; a guess, .*)?"
    assert re.fullmatch(rf"about [\d.]+ (s|min) to read them, {rest}", told)
    left = forecast(str(smollm2), options, 7000, 64, 3500)
    assert re.fullmatch(rf"about [\d.]+ (s|min) to read the 3,500 that are not kept, {rest}", left)
    assert forecast(str(smollm2), options, 7000, 64, 6990) == ""  # that is quick


def test_a_server_and_a_command_tell_the_same(smollm2):
    """Both by one plan: of any length between those that are planned, less what is kept."""
    options = {"device": "cpu", "device_memory": "200MB", "precision": "fast"}
    forecasts = forecasts_of(str(smollm2), options)
    whole, left = forecasts.of(4096), forecasts.of(4096, 4000)
    assert whole.fits
    assert whole.seconds > left.seconds >= whole.pass_seconds > 0
    told = forecast(str(smollm2), options, 4096, 1)
    assert told.startswith(f"about {format_time(whole.seconds)} to read them, ")


def test_what_is_quick_or_cannot_be_planned_is_not(smollm2, tiny_chat):
    """A tiny model, no room, no model."""
    assert forecast(str(tiny_chat), {"device": "cpu"}, 100, 4) == ""
    assert forecast(str(smollm2), {"device": "cpu", "device_memory": "1MB"}, 7000, 64) == ""
    assert forecast("no-such-id", {"device": "cpu"}, 100, 4) == ""
    assert forecasts_of("no-such-id", {"device": "cpu"}).of(1) is None


def test_the_disks_speed_is_told_where_it_was_measured(home, tiny_chat):
    """And nothing that is assumed."""
    options = {"device": "cpu", "device_memory": "200MB"}
    assert forecasts_of(str(tiny_chat), options).disk_bytes_per_second == 0.0
    rates.rates_file().parent.mkdir(parents=True)
    kept = {rates._disk_key(tiny_chat): {"disk": 3e9, "date": "2026-11-28"}}
    rates.rates_file().write_text(json.dumps(kept))
    assert forecasts_of(str(tiny_chat), options).disk_bytes_per_second == 3e9
