"""Answers that are kept: fetched again whole and from where they broke off, and forgotten."""

from __future__ import annotations

import asyncio
import json

import pytest
from asgi_calls import Call, call, calls
from openai.types.chat import ChatCompletion
from openai.types.responses import Response

from ollm_core.server import kept as kept_module
from ollm_core.server.guard import Guard
from ollm_core.server.kept import ID_HEADER

CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"


def chat(**more):
    """A body of a chat that is kept."""
    messages = [{"role": "user", "content": "hello"}]
    return {"messages": messages, "temperature": 0, "max_tokens": 12, "store": True, **more}


def response(**more):
    """That of a response."""
    return {
        "input": "hello", "temperature": 0, "max_output_tokens": 12, "store": True,
        "ignored": None, **more,
    }  # fmt: skip


def data(made):
    """The events of a stream, without comments."""
    parts = made.data.split(b"\n\n")
    return [part for part in parts if part and not part.startswith(b":")]


async def until(is_so):
    """It is."""
    async with asyncio.timeout(30):
        while not is_so():
            await asyncio.sleep(0.005)


def said(event):
    """What text an event of either kind has."""
    fields = event.split(b"data: ")[1]
    if fields == b"[DONE]":
        return ""
    fields = json.loads(fields)
    [choice] = fields.get("choices") or [{"delta": {}}]
    found = fields.get("delta") or choice["delta"].get("content")
    return found if isinstance(found, str) else ""


@pytest.mark.parametrize(("path", "body"), [(CHAT, chat), (RESPONSES, response)])
def test_a_stream_that_broke_off_goes_on_where_it_was(app, service, gate, path, body):
    """The answer is made meanwhile; any place can be asked for again, and all of it at once."""

    async def run():
        want = await call(app, path, body(stream=True, store=False))
        async with Call(app, path, body(stream=True)) as one:
            await one.until(b"delta")
            gate.shut()
            one.leave()
            await one.to_end()
        assert service.places.num_taken == 1  # it goes on
        answer_id = one.headers[ID_HEADER]
        seen = len(data(one))
        place = f"{path}/{answer_id}"
        async with Call(
            app, place, query=f"stream=true&starting_after={seen - 1}".encode()
        ) as rest:
            gate.open()
            await rest.to_end()
        assert rest.is_whole
        assert rest.headers["content-type"] == one.headers["content-type"]
        again = await call(app, place, query=b"stream=true")
        assert data(again) == [*data(one)[:seen], *data(rest)]
        assert service.places.num_taken == 0
        whole = await call(app, place)
        return want, again, whole

    want, again, whole = asyncio.run(run())
    if path == CHAT:
        found = ChatCompletion.model_validate(whole.fields())
        text = found.choices[0].message.content
        assert {event["id"] for event in again.events()[:-1]} == {found.id}
    else:
        text = Response.model_validate(whole.fields()).output_text
    assert text == "".join(map(said, data(want)))


def test_a_whole_answer_is_told_its_id_and_fetched_again(app):
    """The same object; its ids are no others' to guess."""
    for path, body in ((CHAT, chat()), (RESPONSES, response())):
        [made] = calls(app, (path, body))
        fields = made.fields()
        assert made.headers[ID_HEADER] == fields["id"]
        assert len(fields["id"].split("_")[-1].split("-")[-1]) >= 32
        [again] = calls(app, (f"{path}/{fields['id']}",))
        assert again.fields() == fields


def test_a_response_is_made_in_the_background(app, service, gate):
    """Its state is told at once, and what there is of it; then all of it. It can be given up."""

    async def run():
        gate.shut()
        made = await call(app, RESPONSES, response(store=None, background=True))
        fields = made.fields()
        Response.model_validate(fields)
        assert fields["status"] in ("queued", "in_progress")
        assert fields["background"]
        place = f"{RESPONSES}/{fields['id']}"
        other = (await call(app, RESPONSES, response(background=True))).fields()
        await until(gate.held.is_set)
        assert (await call(app, place)).fields()["status"] == "in_progress"
        cancelled = await call(app, f"{RESPONSES}/{other['id']}/cancel", b"")
        assert cancelled.fields()["status"] == "cancelled"
        assert service.places.num_taken == 1
        gate.open()
        await until(lambda: service.places.num_taken == 0)
        done = (await call(app, place)).fields()
        assert (done["status"], done["usage"]["output_tokens"]) == ("incomplete", 12)
        late = await call(app, f"{place}/cancel", b"")
        assert late.fields() == done
        assert (await call(app, f"{RESPONSES}/{other['id']}")).fields()["status"] == "cancelled"

    asyncio.run(run())


def test_what_fails_is_told_to_who_fetches_it(app, model, gate, monkeypatch):
    """With its reason, and not as a failure of the fetching."""
    from ollm_core.errors import ReadError

    def broken(*_):
        raise ReadError("the disk is gone")

    async def run():
        with monkeypatch.context() as patch:
            patch.setattr(model.engine, "run", broken)
            made = await call(app, RESPONSES, response(background=True))
            place = f"{RESPONSES}/{made.fields()['id']}"
            async with asyncio.timeout(30):
                while (found := await call(app, place)).fields()["status"] != "failed":
                    await asyncio.sleep(0.01)
        assert found.fields()["error"] == {"code": "model_failed", "message": "the disk is gone"}
        told = data(await call(app, place, query=b"stream=true"))
        assert json.loads(told[-1].split(b"data: ")[1])["message"] == "the disk is gone"

    asyncio.run(run())


def test_one_can_be_removed(app, service, gate):
    """Also while it is made: nothing of it goes on."""

    async def run():
        gate.shut()
        made = await call(app, RESPONSES, response(background=True, max_output_tokens=200))
        answer_id = made.fields()["id"]
        place = f"{RESPONSES}/{answer_id}"
        gone = await call(app, place, method="DELETE")
        assert gone.fields() == {"id": answer_id, "object": "response", "deleted": True}
        assert service.places.num_taken == 0
        for path in (place, f"{CHAT}/{answer_id}", f"{CHAT}/chatcmpl-1", f"{RESPONSES}/x"):
            assert (await call(app, path)).status == 404
        gate.open()
        await until(lambda: not service.session.num_running + service.session.num_waiting)

    asyncio.run(run())


def test_they_are_kept_for_a_while_and_up_to_a_size(app, service, monkeypatch):
    """The oldest goes first; nothing is kept that was not asked for."""
    kept = service.kept
    kept.clear()
    calls(app, (CHAT, chat(store=False)), (RESPONSES, response(store=None)))
    assert (kept.number, kept.num_bytes) == (0, 0)
    first = calls(app, (CHAT, chat()))[0].fields()["id"]
    size = kept.num_bytes
    monkeypatch.setattr(kept, "_max_bytes", int(size * 2.5))
    others = [calls(app, (CHAT, chat(seed=n)))[0].fields()["id"] for n in range(2)]
    assert [calls(app, (f"{CHAT}/{one}",))[0].status for one in (first, *others)] == [404, 200, 200]
    monkeypatch.setattr(kept_module, "MAX_KEPT", 2)
    calls(app, (CHAT, chat()))
    assert kept.number == 2
    monkeypatch.setattr(kept, "_max_bytes", size // 2)
    [made] = calls(app, (CHAT, chat(stream=True)))
    assert made.events()[-1]["error"]["code"] == "no_room"
    monkeypatch.setattr(kept, "_seconds", 0.0)
    assert calls(app, (f"{CHAT}/{others[1]}",))[0].status == 404


def test_what_is_refused_is_not_kept(app, service):
    """And has a status, as without."""
    service.kept.clear()
    for path, body, param in (
        (CHAT, chat(temperature=-1), "temperature"),
        (CHAT, chat(store="yes"), "store"),
        (CHAT, chat(temperature=-1, stream=True), "temperature"),
        (RESPONSES, response(store=False, background=True), "background"),
        (RESPONSES, response(background=True, temperature=-1), "temperature"),
    ):
        [made] = calls(app, (path, body))
        assert (made.status, made.fields()["error"]["param"]) == (400, param)
    assert service.kept.number == 0


@pytest.mark.parametrize(
    "query", [b"stream=x", b"starting_after=-1", b"a=b", b"%ff", b"&", b"a&" * 20]
)
def test_a_query_that_is_none_is_refused(app, query):
    """Before it is looked whether there is such an answer."""

    async def run():
        return await call(app, f"{CHAT}/chatcmpl-1", query=query)

    assert asyncio.run(run()).status == 400


def test_they_are_under_the_key(service, app):
    """As all else."""
    guard = Guard(app._app, hosts=[], origins=[], api_key="a-long-key")
    answer_id = calls(app, (CHAT, chat()))[0].fields()["id"]
    key = {"authorization": "Bearer a-long-key"}
    assert calls(guard, (f"{CHAT}/{answer_id}",))[0].status == 401
    assert calls(guard, (f"{CHAT}/{answer_id}",), headers=key)[0].status == 200


def test_the_official_client_fetches_them(service):
    """By its own methods: in the background, from an event on, a chat by its id, and away."""
    from openai import NotFoundError, OpenAI
    from running_server import Running

    with Running(service) as running:
        client = OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)
        made = client.responses.create(
            model="x", input="hello", background=True, temperature=0, max_output_tokens=8
        )
        with client.responses.retrieve(made.id, stream=True) as stream:
            events = [*stream]
        with client.responses.retrieve(made.id, stream=True, starting_after=4) as stream:
            assert [*stream] == events[5:]
        done = client.responses.retrieve(made.id)
        assert done.status == "incomplete"
        assert done.output_text == events[-1].response.output_text
        assert client.responses.cancel(made.id).id == made.id
        client.responses.delete(made.id)
        with pytest.raises(NotFoundError):
            client.responses.retrieve(made.id)
        said = [{"role": "user", "content": "hello"}]
        chat = client.chat.completions.create(model="x", messages=said, store=True, max_tokens=4)
        assert client.chat.completions.retrieve(chat.id) == chat
        assert client.chat.completions.delete(chat.id).deleted
        client.close()
