"""Bodies of anybody: each is answered or refused with a reason, and the next one is answered."""

from __future__ import annotations

import json

import pytest
from asgi_calls import calls
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

NUMBERS = st.integers(-3, 3) | st.sampled_from([0.5, 1e300, -0.0, 2**63, 10**30])
TEXTS = st.sampled_from(["", "a", "hello", "<s>", "\x00", "é😀", "x" * 300, "\ud800"])
LEAVES = st.none() | st.booleans() | NUMBERS | TEXTS
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["type", "role", "content", "schema", "a"]), inner)
    ),
    max_leaves=5,
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "system", "assistant"]), "content": TEXTS | VALUES}
    ),
    max_size=2,
)
PLACES = {
    "/v1/chat/completions": ["messages", "response_format", "max_completion_tokens", "logprobs"],
    "/v1/completions": ["prompt", "echo", "logprobs"],
    "/v1/responses": ["input", "instructions", "text", "max_output_tokens", "tools"],
    "/v1/systemone": ["state", "questions", "assets"],
    "/api/chat": ["messages", "options", "format", "think"],
    "/api/generate": ["prompt", "system", "raw", "options", "format"],
    "/page/ask": ["document", "questions", "max_tokens"],
}
COMMON = [
    "model", "stream", "stream_options", "n", "stop", "seed", "temperature", "top_p", "max_tokens",
    "top_logprobs", "service_tier", "metadata", "tools", "user",
]  # fmt: skip
GOOD = {
    "messages": [{"role": "user", "content": "hello"}], "prompt": "hello", "input": "hello",
    "state": "x", "questions": ["hello"], "document": "x",
}  # fmt: skip


LIMITS = {
    "/v1/responses": {"max_output_tokens": 2}, "/v1/systemone": {},
    "/api/chat": {"options": {"num_predict": 2}}, "/api/generate": {"options": {"num_predict": 2}},
}  # fmt: skip
"""Of answers; max_tokens elsewhere."""


def bodies(path: str):
    """Of an address: its fields, of which some have values of any kind."""
    own = PLACES[path]
    good = {name: GOOD[name] for name in own if name in GOOD}
    limit = LIMITS.get(path, {"max_tokens": 2})
    names = st.sampled_from(own) | st.sampled_from(COMMON if path.startswith("/v1") else own)
    changes = st.dictionaries(names, VALUES | MESSAGES, max_size=2)
    return changes.map(lambda fields: {**good, **limit, **fields})


def refusal(made) -> str:
    """The reason, in the form of its protocol."""
    error = made.fields()["error"]
    return error if isinstance(error, str) else error["message"]


@pytest.mark.parametrize("path", PLACES)
def test_any_body_is_answered_or_refused(app, service, path):
    """With 200 or 400, in JSON, and without a failure of the server."""

    statuses = set()

    @settings(
        max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
    )
    @given(bodies(path))
    def check(fields):
        [made] = calls(app, (path, json.dumps(fields).encode()))
        statuses.add(made.status)
        assert made.status in (200, 400), (fields, made.data)
        if made.status == 400:
            assert refusal(made).strip()
            assert "\n" not in refusal(made)
        else:
            assert made.is_whole

    check()
    assert statuses == {200, 400} or path == "/v1/systemone"  # whose labels are no tokens here
    assert service.places.num_taken == 0
    assert service.session.is_open
