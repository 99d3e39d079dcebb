"""Uploads: written as they come, whatever their parts are cut into."""

from __future__ import annotations

import io
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ollm_core.server.errors import RefusedRequestError
from ollm_core.server.upload import Upload

TYPE = b"multipart/form-data; boundary=cut"


def body(*parts: tuple[str, bytes]) -> bytes:
    """A form."""
    shown = (
        f"--cut\r\nContent-Disposition: form-data; {about}\r\n\r\n".encode() + data + b"\r\n"
        for about, data in parts
    )
    return b"".join(shown) + b"--cut--\r\n"


GOOD = body(('name="purpose"', b"batch"), ('name="file"; filename="a.jsonl"', b"{}\n--cu\r\n{}"))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, len(GOOD) - 1), max_size=6))
def test_any_cut_gives_the_same(places):
    """A part may end anywhere."""
    file = io.BytesIO()
    upload = Upload(TYPE, file)
    edges = [0, *sorted(set(places)), len(GOOD)]
    for begin, end in itertools.pairwise(edges):
        upload.take(GOOD[begin:end])
    upload.finish()
    assert file.getvalue() == b"{}\n--cu\r\n{}"
    assert (upload.fields, upload.name, upload.size) == ({"purpose": b"batch"}, "a.jsonl", 11)


@pytest.mark.parametrize(
    "data",
    [
        b"", b"no form", GOOD[:-20], body(('name="purpose"', b"batch")),
        body(('name="purpose"', b"x" * 5000)), body(('name="a"', b""), ('name="a"', b"")),
        body(('name="file"', b"x"), ('name="file"', b"y")), body(*[("name=f", b"")] * 20),
        b"--cut\r\n\r\nx\r\n--cut--\r\n", b"--cut\r\n" + b"A: b\r\n" * 50,
        b"--cut\r\n" + b"A" * 9000,
    ],
)  # fmt: skip
def test_other_forms_are_refused(data):
    """With 400, and never another error."""

    def send():
        upload = Upload(TYPE, io.BytesIO())
        upload.take(data)
        upload.finish()

    with pytest.raises(RefusedRequestError) as refused:
        send()
    assert refused.value.status == 400


@pytest.mark.parametrize("kind", [b"application/json", b"", b"multipart/form-data"])
def test_another_type_is_refused(kind):
    """Before anything is read."""
    with pytest.raises(RefusedRequestError, match="need multipart/form-data"):
        Upload(kind, io.BytesIO())


def test_names_are_made_harmless():
    """One line of printable text, cut."""
    upload = Upload(TYPE, io.BytesIO())
    upload.take(body(('name="file"; filename="a\x1b[31m' + "x" * 500 + '"', b"")))
    assert upload.name == "a[31m" + "x" * 195
