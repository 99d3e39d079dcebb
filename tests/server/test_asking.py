"""Requests of one client, in the event loop."""

from __future__ import annotations

import asyncio

import pytest
from text_requests import greedy

from ollm_core.errors import OllmError
from ollm_core.serving.request import Failed, Finished, NewToken
from ollm_core.serving.session import Session


def test_events_come_with_the_place_of_their_request(service):
    """In their order, to the last one; nothing is there for so long gives nothing."""

    async def run():
        found = []
        async with service.ask([greedy([5, 6, 7], 3), greedy([8, 9], 5), greedy([])]) as asking:
            while not asking.has_ended:
                found += await asking.events(10)
            assert await asking.events(0.01) == []
        return found

    found = asyncio.run(run())
    of_each = [[event for place, event in found if place == one] for one in range(3)]
    assert [sum(isinstance(event, NewToken) for event in one) for one in of_each] == [3, 5, 0]
    assert [type(one[-1]) for one in of_each] == [Finished, Finished, Failed]


def test_leaving_cancels(service, gate):
    """What has not ended, in a pass or before it."""

    async def run():
        gate.shut()
        async with service.ask([greedy([77] * 20, 200)]) as asking:
            assert await asking.events(0.05) == []
            assert asking.num_read(0) in (0, None)
            assert service.session.num_running + service.session.num_waiting == 1
        gate.open()
        async with asyncio.timeout(30):
            while service.session.num_running or service.session.num_waiting:
                await asyncio.sleep(0.005)

    asyncio.run(run())


def test_a_session_that_has_ended_takes_nothing(model):
    """OllmError, and nothing is left half submitted."""
    from ollm_core.server.asking import Asking

    session = Session(model.open_scheduler())
    session.close()

    async def run():
        async with Asking(session, [greedy([5])]):
            raise AssertionError

    with pytest.raises(OllmError, match="the session is closed"):
        asyncio.run(run())
