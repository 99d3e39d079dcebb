"""Places: as many as there are, and an honest time to come again."""

from __future__ import annotations

from contextlib import suppress

import pytest

from ollm_core.server import places as module
from ollm_core.server.errors import RefusedRequestError
from ollm_core.server.places import Places


def test_one_too_many_is_told_when_to_come_again():
    """With 429; a place that is given back is there again, after an error too."""
    places = Places(2, 100)
    with places.taken():
        with suppress(KeyError), places.taken():
            assert places.num_taken == 2
            with pytest.raises(RefusedRequestError) as refused, places.taken():
                pass
            assert refused.value.status == 429
            assert int(refused.value.headers["Retry-After"]) >= 1
            raise KeyError
        assert places.num_taken == 1
    assert places.num_taken == 0


def test_the_time_is_that_of_requests_so_far(monkeypatch):
    """Four places that are held for 80 s each are free every 20 s."""
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    places = Places(4, 100)
    for _ in range(3):
        with places.taken():
            now[0] += 80
    assert places.retry_after == 20
    with places.taken():
        now[0] += 1e6
    assert places.retry_after == 600


def test_bodies_have_so_much_room_together():
    """What one gives back another may take."""
    places = Places(3, 100)
    with places.taken() as one, places.taken() as other:
        one.hold(60)
        other.hold(40)
        with pytest.raises(RefusedRequestError) as refused:
            one.hold(1)
        assert refused.value.status == 429
    with places.taken() as one:
        one.hold(100)
