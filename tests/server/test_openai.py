"""OpenAI's chat and completions: whole and streamed, alone and many at once, and clients that go
away.
"""

from __future__ import annotations

import asyncio
import json

import pytest
from asgi_calls import Call, calls

from ollm_core.api import load
from ollm_core.server import answering
from ollm_core.server.app import open_app
from ollm_core.server.service import Service
from ollm_core.serving.request import Request, SamplingParams, Score

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def said(text: str, **more):
    """A body of a chat."""
    return {"messages": [{"role": "user", "content": text}], "temperature": 0, **more}


def text(made: Call) -> str:
    """Of the only choice of a chat."""
    [choice] = made.fields()["choices"]
    return choice["message"]["content"]


def streamed(made: Call, index: int = 0) -> str:
    """What a stream's chunks of a choice come to."""
    pieces = [
        choice.get("text") or choice.get("delta", {}).get("content") or ""
        for event in made.events()
        if event != "[DONE]"
        for choice in event["choices"]
        if choice["index"] == index
    ]
    return "".join(pieces)


def test_a_chat_is_answered(app, model):
    """With the tokens that transformers finds, what it took, and why it ended."""
    [made] = calls(app, (CHAT, said("hello", max_tokens=7)))
    assert (made.status, made.headers["content-type"]) == (200, "application/json")
    fields = made.fields()
    assert fields["model"] == "tiny"
    assert fields["usage"]["completion_tokens"] == 7
    ids = model.tokenizer("[user]hello[assistant]", return_tensors="pt").input_ids
    found = model.generate(ids, max_new_tokens=7, do_sample=False, eos_token_id=None)
    assert text(made) == model.tokenizer.decode(found[0, ids.shape[1] :])


def test_under_load_answers_are_those_alone(app):
    """Eight at once, streams and whole ones, texts and chats; each as when nobody else asks."""
    bodies = [said(f"number {n} " * (n + 1), max_tokens=5 + n) for n in range(8)]
    alone = [text(calls(app, (CHAT, body))[0]) for body in bodies]
    assert len(set(alone)) > 4
    together = calls(
        app, *((CHAT, {**body, "stream": n % 2 == 1}) for n, body in enumerate(bodies))
    )
    found = [streamed(one) if n % 2 else text(one) for n, one in enumerate(together)]
    assert found == alone


def test_a_stream_has_a_comment_first_and_its_usage_last(app):
    """As clients read it: a role, pieces, a reason, what it took, and the end."""
    body = said("hello", max_tokens=5, stream=True, stream_options={"include_usage": True})
    [made] = calls(app, (CHAT, body))
    assert made.headers["content-type"].startswith("text/event-stream")
    assert made.data.startswith(b': {"state":"received"}\n\n')
    assert made.headers["ollm-prompt-tokens"] == "22"
    assert 0 < float(made.headers["ollm-forecast-seconds"]) <= 2.2
    *events, end = made.events()
    assert end == "[DONE]"
    assert made.is_whole
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert events[-2]["choices"][0]["finish_reason"] == "length"
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["completion_tokens"] == 5
    assert {event["usage"] for event in events[:-1]} == {None}
    assert len({event["id"] for event in events}) == 1
    [whole] = calls(app, (CHAT, said("hello", max_tokens=5)))
    assert streamed(made) == text(whole)


def test_what_was_read_before_takes_no_time_in_the_forecast(app):
    """Twenty characters are a token each, and of a second a tenth each."""
    body = {"prompt": "~ text of its own, w", "max_tokens": 5, "temperature": 0, "stream": True}
    [first] = calls(app, (TEXT, body))
    [again] = calls(app, (TEXT, body))
    assert first.headers["ollm-prompt-tokens"] == again.headers["ollm-prompt-tokens"] == "20"
    assert first.headers["ollm-forecast-seconds"] == "2.0"
    assert again.headers["ollm-forecast-seconds"] == "0.1"  # the last token is computed again
    assert streamed(again) == streamed(first)


def test_several_answers_have_an_index_each(app):
    """With `n`, several prompts, a seed: the same whole and streamed."""
    body = {"prompt": ["ab", "cd"], "n": 2, "seed": 5, "max_tokens": 6, "temperature": 2}
    whole, again, stream = calls(app, (TEXT, body), (TEXT, body), (TEXT, {**body, "stream": True}))
    texts = [one["text"] for one in whole.fields()["choices"]]
    assert [one["index"] for one in whole.fields()["choices"]] == [0, 1, 2, 3]
    assert len(set(texts)) == 4
    assert [one["text"] for one in again.fields()["choices"]] == texts
    assert [streamed(stream, index) for index in range(4)] == texts
    assert whole.fields()["usage"]["prompt_tokens"] == 4
    assert whole.fields()["usage"]["completion_tokens"] == 24


def test_a_stop_text_ends_and_is_left_out(app):
    """In a stream, too, nothing of it is sent."""
    [made] = calls(app, (CHAT, said("hello", max_tokens=12)))
    whole = text(made)
    stop = next(
        two for n in range(3, 9) if (two := whole[n : n + 2]).isprintable() and len(two) == 2
    )
    body = said("hello", max_tokens=12, stop=[stop])
    stopped, stream = calls(app, (CHAT, body), (CHAT, {**body, "stream": True}))
    assert text(stopped) == streamed(stream) == whole[: whole.index(stop)]
    assert stopped.fields()["choices"][0]["finish_reason"] == "stop"


def test_log_probabilities_are_the_same_in_a_stream(app):
    """Of a chat, each with its likeliest ones; of a text, in columns whose places follow."""
    body = said("hello", max_tokens=4, logprobs=True, top_logprobs=2)
    whole, stream = calls(app, (CHAT, body), (CHAT, {**body, "stream": True}))
    content = whole.fields()["choices"][0]["logprobs"]["content"]
    assert [len(one["top_logprobs"]) for one in content] == [2] * 4
    parts = [
        one
        for event in stream.events()[:-1]
        for one in (event["choices"][0]["logprobs"] or {"content": []})["content"]
    ]
    assert [one["token"] for one in parts] == [one["token"] for one in content]
    for name in ("logprob", "bytes"):
        assert [one[name] for one in parts] == [
            pytest.approx(one[name], abs=1e-4) for one in content
        ]
    columns = {"prompt": "hello", "max_tokens": 4, "temperature": 0, "logprobs": 1}
    whole, stream = calls(app, (TEXT, columns), (TEXT, {**columns, "stream": True}))
    expected = whole.fields()["choices"][0]["logprobs"]
    pieces = [event["choices"][0]["logprobs"] for event in stream.events()[:-1]]
    for name in ("tokens", "token_logprobs", "text_offset"):
        found = [one for piece in pieces if piece for one in piece[name]]
        assert found == (
            pytest.approx(expected[name], abs=1e-4) if "prob" in name else expected[name]
        )


def test_an_echo_tells_the_prompts_log_probabilities(app, service, model):
    """As lm-eval asks for them: those that scoring finds, and whether each token was the likeliest;
    with a token more, and without.
    """
    prompts = ["hello you", "other"]
    ids = [model.tokenizer(one)["input_ids"] for one in prompts]
    asked = [Request(token_ids=one, wanted=Score(len(one) - 1)) for one in ids]
    scored = [one.scored for [one] in model.answer(asked)]
    body = {"prompt": ids, "echo": True, "logprobs": 1, "temperature": 0}
    [made, without] = calls(
        app, (TEXT, {**body, "max_tokens": 1}), (TEXT, {**body, "max_tokens": 0})
    )
    for place, (one, none) in enumerate(
        zip(made.fields()["choices"], without.fields()["choices"], strict=True)
    ):
        logprobs, num = one["logprobs"], len(ids[place])
        assert one["text"].startswith(prompts[place])
        assert none["text"] == prompts[place]
        assert len(logprobs["tokens"]) == num + 1 == len(none["logprobs"]["tokens"]) + 1
        assert logprobs["token_logprobs"][0] is None
        assert logprobs["token_logprobs"][1:num] == pytest.approx(scored[place].logprobs, abs=1e-4)
        greedy = [
            token == max(top, key=top.get)
            for token, top in zip(logprobs["tokens"][1:], logprobs["top_logprobs"][1:], strict=True)
        ]
        assert greedy == [*scored[place].greedy, True]
        assert logprobs["text_offset"][:3] == [0, 1, 2]
    assert without.fields()["usage"]["completion_tokens"] == 0


def test_an_echo_without_log_probabilities(app):
    """Is the text again, whole and streamed."""
    body = {"prompt": "hello", "echo": True, "max_tokens": 3, "temperature": 0}
    whole, stream = calls(app, (TEXT, body), (TEXT, {**body, "stream": True}))
    found = whole.fields()["choices"][0]
    assert found["text"].startswith("hello")
    assert found["logprobs"] is None
    assert streamed(stream) == found["text"]


def test_an_answer_follows_its_schema(app):
    """Whole and streamed, by OpenAI's field; an object of any kind by the other one."""
    schema = {
        "type": "object", "properties": {"a": {"type": "integer", "maximum": 9, "minimum": 0}},
        "required": ["a"], "additionalProperties": False,
    }  # fmt: skip
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    body = said("hello", max_tokens=60, response_format=wanted)
    whole, stream = calls(app, (CHAT, body), (CHAT, {**body, "stream": True}))
    assert json.loads(text(whole)).keys() == {"a"}
    assert streamed(stream) == text(whole)
    assert whole.fields()["choices"][0]["finish_reason"] == "stop"
    [any_kind] = calls(app, (CHAT, {**body, "response_format": {"type": "json_object"}}))
    assert text(any_kind).startswith("{")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 3}}}},
            "response_format",
        ),
        ({"response_format": {"type": "json_object"}, "ignore_eos": True}, "ignore_eos"),
        ({"response_format": {"type": "json_object"}, "min_tokens": 2}, "min_tokens"),
    ],
)
def test_formats_that_cannot_be_are_refused(app, fields, param):
    """With the field's name."""
    [made] = calls(app, (CHAT, said("hello", **fields)))
    assert (made.status, made.fields()["error"]["param"]) == (400, param)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body", "param", "code"),
    [
        (CHAT, {"messages": []}, "messages", "invalid_request"),
        (CHAT, said("x", temperature=-1), "temperature", "invalid_request"),
        (CHAT, said("x", tools=[{}]), "tools", "unsupported_parameter"),
        (CHAT, said("x", colour=1), "colour", "unknown_parameter"),
        (CHAT, said("x" * 300), None, "context_length_exceeded"),
        (TEXT, {"prompt": [999]}, None, "invalid_prompt"),
        (TEXT, {}, "prompt", "invalid_request"),
    ],
)
def test_wrong_fields_are_refused_in_openais_form(app, path, body, param, code, stream):
    """With the field's name and a status, of a stream too."""
    [made] = calls(app, (path, {**body, "stream": stream}))
    error = made.fields()["error"]
    assert (made.status, error["type"]) == (400, "invalid_request_error")
    assert (error["param"], error["code"]) == (param, code)
    assert "\n" not in error["message"]


async def free(service) -> None:
    """Until nothing of anybody is left in the session."""
    async with asyncio.timeout(30):
        while service.session.num_running or service.session.num_waiting:
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_place(app, service, gate, stream):
    """In the queue, while its prompt is read, and while its answer is made; the pass that it was
    alone in is broken off.
    """
    long = said("x" * 40, max_tokens=200, ignore_eos=True, stream=stream)

    async def run():
        # while its answer is made
        async with Call(app, CHAT, long) as one:
            await until(lambda: service.session.num_running)
            if stream:
                await one.until(b'"content":"')
            one.leave()
            await one.to_end()
            await free(service)
            assert service.places.num_taken == 0
        # while its prompt is read, and in the queue behind that
        gate.shut()
        async with Call(app, CHAT, long) as one, Call(app, CHAT, {**long, "seed": 1}) as two:
            await until(gate.held.is_set)
            await until(lambda: service.places.num_taken == 2)
            two.leave()
            await two.to_end()
            assert service.places.num_taken == 1
            one.leave()
            await one.to_end()
            assert service.places.num_taken == 0
            passes = model_passes(service)
            gate.open()
            await free(service)
            assert model_passes(service) == passes

    asyncio.run(run())


def model_passes(service) -> int:
    """That have ended."""
    return service.model.stats.weight_passes


async def until(is_so) -> None:
    """It is."""
    async with asyncio.timeout(30):
        while not is_so():
            await asyncio.sleep(0.005)


def test_what_may_wait_comes_after_chats(app, service):
    """service_tier flex: OpenAI's word for it."""
    asked = []
    submit = service.session.submit

    def note(request, on_event):
        asked.append(request.priority)
        return submit(request, on_event)

    service.session.submit = note
    try:
        calls(
            app,
            (CHAT, said("a", max_tokens=1)),
            (CHAT, said("b", service_tier="flex", max_tokens=1)),
        )
    finally:
        del service.session.submit
    assert sorted(asked) == [0, 10]


def test_progress_is_told_before_the_first_token(app, service, gate, monkeypatch):
    """In comments: that it waits, and then that its prompt is read, with what is known of it."""
    monkeypatch.setattr(answering, "PROGRESS_SECONDS", 0.02)

    async def run():
        gate.shut()
        async with Call(app, CHAT, said("y" * 90, max_tokens=2, stream=True)) as one:
            await one.until(b'"state":"reading","prompt_tokens":107,"read_tokens":')
            assert b"data:" not in one.data
            await until(gate.held.is_set)
            await one.until(b'"pass":')
            gate.open()
            await one.to_end()
            assert one.events()[-1] == "[DONE]"

    asyncio.run(run())


def test_a_long_prompt_does_not_hold_up_the_first_byte(app, service, monkeypatch):
    """The stream begins while it is still encoded; what is then refused is told in the stream."""
    monkeypatch.setattr(answering, "_READ_SECONDS", 0.02)
    monkeypatch.setattr(answering, "PROGRESS_SECONDS", 0.02)

    async def run():
        slow = asyncio.get_running_loop().run_in_executor(
            service._reading, __import__("time").sleep, 0.4
        )
        good = said("hi", max_tokens=2, stream=True)
        async with Call(app, CHAT, good) as one, Call(app, CHAT, {**good, "n": 0}) as two:
            await one.until(b'"state":"encoding"')
            assert not slow.done()
            await asyncio.gather(one.to_end(), two.to_end())
            assert one.events()[-1] == "[DONE]"
            [refused] = two.events()
            assert (two.status, refused["error"]["param"]) == (200, "n")

    asyncio.run(run())


def test_who_waits_long_for_a_whole_answer_gets_white_space(app, service, gate, monkeypatch):
    """Before the object, so that nobody on the way gives up; it is JSON all the same."""
    monkeypatch.setattr(answering, "PATIENCE_SECONDS", 0.02)

    async def run():
        gate.shut()
        async with Call(app, CHAT, said("hi", max_tokens=2)) as one:
            await one.until(b"\n\n")
            gate.open()
            await one.to_end()
            assert one.fields()["usage"]["completion_tokens"] == 2

    asyncio.run(run())


def test_what_fails_in_a_pass_is_told(app, service, model, monkeypatch):
    """With a status where there is none yet, in the stream else; the next one is answered."""
    from ollm_core.errors import ReadError

    def broken(*_):
        raise ReadError("the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr(model.engine, "run", broken)
        whole, stream = calls(app, (CHAT, said("hi")), (CHAT, said("hi", stream=True)))
    assert (whole.status, whole.fields()["error"]["message"]) == (500, "the disk is gone")
    assert stream.events()[-1]["error"]["code"] == "model_failed"
    assert calls(app, (CHAT, said("hi", max_tokens=1)))[0].status == 200


def test_a_request_has_samplings_own_words(service):
    """Nothing is lost between a body and the request that is made of it."""
    body = asyncio.run(
        service.read_body("chat", said("x", seed=3, top_p=0.5, max_tokens=9, stop="z"))
    )
    [request], scores = body.requests()
    assert scores == [None]
    assert request.wanted == SamplingParams(
        temperature=0, seed=3, top_p=0.5, max_tokens=9, stop="z"
    )


def test_drafts_change_no_answer(tiny_chat, app):
    """Greedy and with a seed, alone and two at once, of functions' schemas, too: only passes."""
    schema = {"type": "json_schema", "json_schema": {"schema": {"enum": ["abcabcabcabc"]}}}
    bodies = [
        said("hello", max_tokens=60, ignore_eos=True),
        said("ab ab ab ab", max_tokens=40, ignore_eos=True, temperature=0.3, seed=3),
        said("abcabcabc", max_tokens=30, response_format=schema),
    ]
    plain = [text(calls(app, (CHAT, body))[0]) for body in bodies]
    drafts = {"draft": "lookup", "num_draft_tokens": 4}
    with (
        load(tiny_chat, device="cpu", chunk_size=64, **drafts) as model,
        Service(model, "tiny") as service,
    ):
        drafted = open_app(service)
        assert [text(calls(drafted, (CHAT, body))[0]) for body in bodies] == plain
        assert model.stats.accepted_tokens > 5
        together = calls(drafted, *((CHAT, body) for body in bodies))
        assert [text(one) for one in together] == plain
        [page] = calls(drafted, ("/metrics",))
        assert b"ollm_drafted_tokens_accepted_total" in page.data
