"""Files and batches over HTTP."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from asgi_calls import calls

from ollm_core.server.app import open_app
from ollm_core.server.batch_routes import BatchRoutes
from ollm_core.server.batches import Batches
from ollm_core.server.file_store import FileStore


@pytest.fixture
def store(tmp_path):
    """Of a directory that is not there yet."""
    with FileStore(tmp_path / "files", 50_000) as opened:
        yield opened


@pytest.fixture
def app(service, store):
    """With files and batches."""
    with Batches(service, store) as batches:
        yield open_app(service, BatchRoutes(service, store, batches).routes())


LINE = {
    "custom_id": "r1", "method": "POST", "url": "/v1/completions",
    "body": {"prompt": "hello", "max_tokens": 2, "temperature": 0},
}  # fmt: skip


def form(data: bytes, purpose: str = "batch") -> bytes:
    """A file, as clients send it."""
    part = "--cut\r\nContent-Disposition: form-data; name="
    return (
        f'{part}"purpose"\r\n\r\n{purpose}\r\n{part}"file"; filename="rows.jsonl"\r\n\r\n'.encode()
        + data
        + b"\r\n--cut--\r\n"
    )


def sent(app, body):
    """An upload."""
    [made] = calls(
        app, ("/v1/files", body), headers={"content-type": "multipart/form-data; boundary=cut"}
    )
    return made


def test_a_file_is_sent_read_batched_and_removed(app):
    """As OpenAI's addresses do it."""
    data = json.dumps(LINE).encode() + b"\n"
    made = sent(app, form(data)).fields()
    assert (made["bytes"], made["filename"], made["purpose"]) == (len(data), "rows.jsonl", "batch")
    file_id = made["id"]
    listed, one, content = calls(
        app, ("/v1/files",), (f"/v1/files/{file_id}",), (f"/v1/files/{file_id}/content",)
    )
    assert listed.fields()["data"] == [one.fields()] == [made]
    assert content.data == data
    batch = {"endpoint": "/v1/completions", "input_file_id": file_id, "completion_window": "24h"}
    [created] = calls(app, ("/v1/batches", batch))
    done = created.fields()
    while done["status"] != "completed":
        [asked] = calls(app, (f"/v1/batches/{done['id']}",))
        done = asked.fields()
        assert done["status"] in ("validating", "in_progress", "completed"), done
    [output] = calls(app, (f"/v1/files/{done['output_file_id']}/content",))
    assert output.fields()["custom_id"] == "r1"
    wrong = calls(
        app, (f"/v1/batches/{file_id}",), (f"/v1/batches/{file_id}/cancel", {}),
        (f"/v1/files/{done['id']}",), (f"/v1/files/{done['id']}/content",),
    )  # fmt: skip
    wrong += calls(app, (f"/v1/files/{done['id']}",), method="DELETE")
    assert [one.status for one in wrong] == [404] * 5  # neither is the other
    [again] = calls(app, (f"/v1/batches/{done['id']}/cancel", {}))
    assert again.status == 409
    [removed] = calls(app, (f"/v1/files/{file_id}",), method="DELETE")
    assert removed.fields() == {"id": file_id, "object": "file", "deleted": True}
    [gone] = calls(app, (f"/v1/files/{file_id}",))
    assert gone.status == 404


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (form(b"x", purpose="fun"), 400),
        (b"no form", 400),
        (form(b"x" * 60_000), 413),
        ([form(b"x" * 40_000)[:30_000], None], 408),
    ],
)
def test_what_is_refused_leaves_nothing(app, store, monkeypatch, body, status):
    """No file, no record."""
    monkeypatch.setattr("ollm_core.server.batch_routes.UPLOAD_SECONDS", 0.2)
    monkeypatch.setattr("ollm_core.server.client._DRAIN_SECONDS", 0.05)
    assert sent(app, body).status == status
    assert [path.name for path in Path(store.directory).iterdir()] == ["lock"]


def test_another_method_is_refused_with_those_there_are(app):
    """All of a path's, whichever was registered first."""
    for path, expected in (
        ("/v1/files", {"GET", "HEAD", "POST"}), ("/v1/batches", {"GET", "HEAD", "POST"}),
        ("/v1/files/file-1", {"GET", "HEAD", "DELETE"}), ("/v1/batches/1/cancel", {"POST"}),
    ):  # fmt: skip
        [refused] = calls(app, (path,), method="PATCH")
        assert refused.status == 405
        assert set(refused.headers["allow"].split(", ")) == expected


def test_no_path_leads_out(app):
    """Of any address."""
    for name in ("../lock", "..%2flock", "lock", "file-" + "0" * 24, "%00"):
        for path in (f"/v1/files/{name}", f"/v1/files/{name}/content", f"/v1/batches/{name}"):
            [made] = calls(app, (path,))
            assert made.status == 404
