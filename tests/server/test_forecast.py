"""Forecasts between the lengths that were planned."""

from __future__ import annotations

import pytest

from ollm_core.server.forecast import Forecast, Forecasts, make_forecasts


@pytest.mark.parametrize(
    ("num_tokens", "seconds", "fits"),
    [(0, 0, True), (50, 5, True), (100, 10, True), (150, 30, False)],
)
def test_between_two_it_is_a_line(num_tokens, seconds, fits):
    """It fits where the longer one does."""
    forecasts = Forecasts([Forecast(100, 10.0, True), Forecast(200, 50.0, False)])
    assert forecasts.of(num_tokens) == Forecast(num_tokens, seconds, fits)
    assert forecasts.of(201) is None


@pytest.mark.parametrize(
    ("num_tokens", "num_kept", "seconds"), [(100, 40, 6), (150, 100, 20), (150, 149, 3), (50, 0, 5)]
)
def test_what_was_read_before_is_not_read_again(num_tokens, num_kept, seconds):
    """At least a pass is left."""
    forecasts = Forecasts([Forecast(100, 10.0, True, 3.0), Forecast(200, 50.0, True, 3.0)])
    assert forecasts.of(num_tokens, num_kept).seconds == seconds


def test_without_a_plan_there_is_none():
    """And nothing is made up."""
    assert Forecasts().of(1) is None


def test_lengths_are_planned_up_to_the_longest():
    """Which is among them; one that cannot be planned is the end."""
    asked = []

    def plan(length):
        asked.append(length)
        return Forecast(length, length / 10, True) if length < 2000 else None

    forecasts = make_forecasts(5000, plan)
    assert asked == [256, 1024, 4096]
    assert forecasts.of(1024).seconds == 102.4
    assert forecasts.of(1025) is None
    asked.clear()
    make_forecasts(200, plan)
    assert asked == [200]
