"""Batches of a server, by the official client and without it: answered, cancelled, gone on with."""

from __future__ import annotations

import json
import time
from contextlib import ExitStack

import pytest
from asgi_calls import calls

from ollm_core.server.app import open_app
from ollm_core.server.batch_routes import BatchRoutes
from ollm_core.server.batches import Batches, counts
from ollm_core.server.errors import RefusedRequestError
from ollm_core.server.file_store import FileStore, file_record, new_id
from ollm_core.serving.jobs.job import BatchProgress


def row(number: int, num_new: int = 3, **more) -> dict:
    """A line of a batch."""
    body = {"prompt": f"number {number}", "max_tokens": num_new, "temperature": 0, **more}
    return {"custom_id": f"r{number}", "method": "POST", "url": "/v1/completions", "body": body}


@pytest.fixture
def opened(service, tmp_path):
    """A store and batches; and how they are closed."""
    with ExitStack() as stack:
        store = stack.enter_context(FileStore(tmp_path / "files", 100_000))
        yield store, stack.enter_context(Batches(service, store)), stack


def add(store, rows) -> str:
    """A file of rows."""
    file_id = new_id("file")
    data = "".join(json.dumps(one) + "\n" for one in rows).encode()
    with store.create(file_id) as file:
        file.write(data)
    store.write(file_record(file_id, "batch", "rows.jsonl", len(data)))
    return file_id


def wanted(store, rows) -> dict:
    """What creates a batch of them."""
    return {"endpoint": "/v1/completions", "input_file_id": add(store, rows)}


def until(batches, batch_id, *states) -> dict:
    """A batch, when it is in one of these states."""
    end = time.monotonic() + 60
    while (batch := batches.get(batch_id))["status"] not in states:
        assert time.monotonic() < end, batch
        time.sleep(0.01)
    return batch


def lines(store, file_id) -> dict:
    """Of an output, by custom_id."""
    found = map(json.loads, store.content(file_id).read_text().splitlines())
    return {one["custom_id"]: one for one in found}


def test_a_file_that_is_still_sent_is_none(opened):
    """Its record comes when it is whole."""
    store, batches, _ = opened
    file_id = new_id("file")
    store.create(file_id).close()
    with pytest.raises(RefusedRequestError) as refused:
        batches.create({"endpoint": "/v1/completions", "input_file_id": file_id})
    assert (refused.value.status, refused.value.param) == (404, "input_file_id")


def test_rows_are_answered_as_requests_are(opened, app):
    """And those that cannot be are told in the error file."""
    store, batches, _ = opened
    made = batches.create(
        {**wanted(store, [row(1), row(2, n=0), row(3)]), "metadata": {"who": "me"}}
    )
    assert (made["status"], made["object"]) == ("validating", "batch")
    done = until(batches, made["id"], "completed")
    assert done["request_counts"] == {"total": 3, "completed": 2, "failed": 1}
    assert done["metadata"] == {"who": "me"}
    answers = lines(store, done["output_file_id"])
    [alone] = calls(app, ("/v1/completions", row(3)["body"]))
    text = answers["r3"]["response"]["body"]["choices"][0]["text"]
    assert text == alone.fields()["choices"][0]["text"]
    assert answers.keys() == {"r1", "r3"}
    assert lines(store, done["error_file_id"])["r2"]["error"]["param"] == "n"
    assert store.read(done["output_file_id"], "file")["purpose"] == "batch_output"
    assert [one["id"] for one in batches.listed()] == [made["id"]]


def test_one_that_is_cancelled_keeps_what_it_has(opened, gate):
    """And others run after it; one that waits is cancelled, too."""
    store, batches, _ = opened
    rows = [row(1, 1), *(row(n, 200, ignore_eos=True) for n in range(2, 6))]
    made = batches.create(wanted(store, rows))
    waits = batches.create(wanted(store, [row(9)]))
    end = time.monotonic() + 30
    while not store.content(store.read(made["id"], "batch")["files"][0]).is_file():
        assert time.monotonic() < end
        time.sleep(0.005)
    gate.shut()
    assert batches.cancel(made["id"])["status"] == "cancelling"
    assert batches.cancel(waits["id"])["status"] == "cancelling"
    gate.open()
    done = until(batches, made["id"], "cancelled")
    assert until(batches, waits["id"], "cancelled")["output_file_id"] is None
    answers = lines(store, done["output_file_id"]) if done["output_file_id"] else {}
    assert {one["response"]["body"]["choices"][0]["finish_reason"] for one in answers.values()} <= {
        "length", "stop",
    }  # fmt: skip
    assert len(answers) < 5
    other = batches.create(wanted(store, [row(7)]))
    until(batches, other["id"], "completed")


def test_a_batch_goes_on_after_the_server_was_stopped(opened, service, gate):
    """With exactly the rows that are left; none is told to have failed."""
    store, batches, _ = opened
    made = batches.create(wanted(store, [row(n, 1 + 40 * (n > 2)) for n in range(6)]))
    output = store.content(store.read(made["id"], "batch")["files"][0])
    end = time.monotonic() + 30
    while not output.is_file() or not output.stat().st_size:
        assert time.monotonic() < end
        time.sleep(0.002)
    batches.close()
    before = output.read_bytes()
    assert batches.get(made["id"])["status"] == "in_progress"
    with Batches(service, store) as again:
        done = until(again, made["id"], "completed")
    assert output.read_bytes().startswith(before)
    assert done["request_counts"] == {"total": 6, "completed": 6, "failed": 0}
    assert len(lines(store, done["output_file_id"])) == 6
    assert done["error_file_id"] is None


def test_what_ends_a_batch_is_told(opened):
    """Without the directory; the next one runs."""
    store, batches, _ = opened
    fields = wanted(store, [row(1)])
    blocked = batches.create(fields)
    until(batches, blocked["id"], "completed")
    record = store.read(blocked["id"], "batch")
    record |= {"status": "in_progress"}
    store.content(record["files"][0]).write_text('{"custom_id": "r7"}\n')
    store.content(record["files"][0]).with_name(record["files"][0] + ".job").unlink(missing_ok=True)
    store.write(record)
    batches._waiting.put(record["id"])
    done = until(batches, record["id"], "failed", "completed")
    [error] = done["errors"]["data"]
    assert "nothing says how they were made" in error["message"]
    assert str(store.directory) not in error["message"]


def test_counts_are_of_all_runs():
    """Rows that earlier ones have ended, too."""
    progress = BatchProgress(num_rows=10, num_found=4, num_answered=2, num_failed=1)
    assert counts(progress, 3) == {"total": 10, "completed": 4, "failed": 3}


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"endpoint": "/v1/embeddings"}, 400),
        ({"input_file_id": 3}, 400),
        ({"input_file_id": "file-000000000000000000000000"}, 404),
        ({"input_file_id": "../../etc/passwd"}, 404),
        ({"metadata": []}, 400),
    ],
)
def test_wrong_batches_are_refused(opened, service, fields, status):
    """In OpenAI's form."""
    store, batches, _ = opened
    app = open_app(service, BatchRoutes(service, store, batches).routes())
    [made] = calls(app, ("/v1/batches", {**wanted(store, [row(1)]), **fields}))
    assert made.status == status
    assert made.fields()["error"]["message"]
    assert batches.listed() == []
