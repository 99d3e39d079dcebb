"""A session: requests from any thread, events in a stream for each."""

from __future__ import annotations

import gc
import threading

import pytest
from text_requests import greedy

from ollm_core.errors import InputError
from ollm_core.serving.request import Failed, Finished, NewToken, SamplingParams
from ollm_core.serving.session import Session, SessionClosedError


@pytest.fixture
def session(model):
    """One of a tiny model."""
    with Session(model.open_scheduler()) as opened:
        yield opened


def tokens(stream):
    """Of a stream, to its end."""
    return [event.token_id for event in stream if isinstance(event, NewToken)]


def test_threads_submit_and_read_each_their_own(session, ids, alone):
    """Eight at once; each gets the tokens that it gets alone."""
    found = {}

    def ask(seed):
        found[seed] = tokens(session.submit(greedy(ids(20 + seed, seed), 6)))

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    session.close()
    assert found == {seed: alone(ids(20 + seed, seed), 6) for seed in range(8)}


def test_a_refused_request_has_one_event(session):
    """And the session goes on."""
    [event] = session.submit(greedy([]))
    assert isinstance(event, Failed)
    assert isinstance(event.error, InputError)
    assert len(tokens(session.submit(greedy([5], 3)))) == 3


def test_a_closed_stream_is_cancelled(session, ids):
    """Also one that nobody refers to any more."""
    stream = session.submit(greedy(ids(20), 4000))
    assert isinstance(next(stream), NewToken)
    stream.close()
    events = list(stream)
    assert isinstance(events[-1], Finished)
    assert events[-1].reason == "cancelled"
    dropped = session.submit(greedy(ids(20), 4000))
    next(dropped)
    del dropped
    gc.collect()
    assert len(tokens(session.submit(greedy(ids(9), 2)))) == 2
    while session._scheduler.num_running:
        pass  # ends only if the dropped one was cancelled: 4,000 tokens would take minutes


def test_closing_ends_what_runs(model, ids):
    """Each stream ends, and nothing more can be asked."""
    session = Session(model.open_scheduler())
    streams = [session.submit(greedy(ids(20, seed), 4000)) for seed in range(3)]
    next(streams[0])
    session.close()
    session.close()
    for stream in streams:
        last = list(stream)[-1]
        if isinstance(last, Failed):
            assert isinstance(last.error, SessionClosedError)
        else:
            assert last.reason == "cancelled"
    with pytest.raises(SessionClosedError, match="the session is closed"):
        session.submit(greedy(ids(5)))


def test_several_answers_come_in_one_stream(session, ids):
    """It ends after the last of them."""
    request = greedy(ids(20), 3, n=2)
    assert isinstance(request.wanted, SamplingParams)
    ends = [event.index for event in session.submit(request) if isinstance(event, Finished)]
    assert sorted(ends) == [0, 1]


def test_get_waits_so_long(session, ids):
    """None while there is nothing, StopIteration after the end."""
    stream = session.submit(greedy(ids(5), 1))
    while stream.get(timeout=5) is not None:
        if not stream._open:
            break
    with pytest.raises(StopIteration):
        stream.get(timeout=0)


def test_who_cannot_wait_is_called(session, ids):
    """After each event, when it can be got without waiting."""
    told = []
    stream = session.submit(greedy(ids(20), 3), lambda: told.append(stream_has(stream)))

    def stream_has(stream):
        return stream._events.qsize() > 0

    events = list(stream)
    assert len(events) == len(told) == 4
    assert any(told)


def test_it_tells_who_waits_and_runs(session, ids):
    """And how much of a prompt is read."""
    assert (session.num_waiting, session.num_running, session.is_open) == (0, 0, True)
    stream = session.submit(greedy(ids(20), 4000))
    next(stream)
    assert session.num_running == 1
    assert session.num_read(stream.request_id) >= 20
    stream.close()
    list(stream)
    assert session.num_read(stream.request_id) is None
    session.close()
    assert not session.is_open


def test_a_beginning_that_several_share_is_read_for_each(model, ids):
    """Who waits for it is told how far it is."""
    told = []
    shared = ids(300)
    with Session(model.open_scheduler()) as session:
        held = session.submit(greedy(ids(20, 9), 4000))
        next(held)
        going = threading.Event()

        def note(_):
            going.wait(20)
            told.append([session.num_read(one.request_id) for one in streams])

        streams = [session.submit(greedy([*shared, *ids(5, number + 1)], 2)) for number in range(4)]
        model.on_progress(note)
        going.set()
        for one in streams:
            list(one)
        model.on_progress(None)
        held.close()
    assert any(None not in one and len({*one}) == 1 for one in told)


def test_closing_a_stream_while_it_is_handed_on(model, ids):
    """Before the scheduler knows the request there is nothing to cancel; it is cancelled after."""
    scheduler = model.open_scheduler()
    add, streams, going = scheduler.add, [], threading.Event()

    def close_first(request):
        going.wait()
        streams[0].close()
        add(request)

    scheduler.add = close_first
    with Session(scheduler) as session:
        streams.append(session.submit(greedy(ids(20), 4000)))
        going.set()
        [event] = list(streams[0])
        assert event.reason == "cancelled"
