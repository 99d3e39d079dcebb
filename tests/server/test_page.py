"""The page for people: its headers, what it asks, and what a person sees in a browser."""

from __future__ import annotations

import re
import shutil
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from asgi_calls import calls
from running_server import Running
from thinking_model import ANSWER, THOUGHT, make_thinking

from ollm_core.api import load
from ollm_core.server import page
from ollm_core.server.page import FILES
from ollm_core.server.service import Service
from ollm_core.serving.openai.requests import Defaults

CHROMIUM = shutil.which("chromium")


def test_it_needs_nothing_from_elsewhere(app):
    """Nor may it: by its headers, and by what its files name."""
    for path, (name, kind) in FILES.items():
        [made] = calls(app, (path,))
        assert (made.status, made.headers["content-type"]) == (200, kind)
        assert "default-src 'none'" in made.headers["content-security-policy"]
        assert "unsafe" not in made.headers["content-security-policy"]
        assert made.headers["x-content-type-options"] == "nosniff"
        text = (Path(page.__file__).with_name("page_files") / name).read_text()
        assert made.data.decode() == text
        assert not re.findall(r"https?://|innerHTML|eval\(|style=|onclick", text)
        for named in re.findall(r'(?:src|href)="([^"#]+)"', text):
            assert named in (*FILES, "data:,")


def test_it_is_shown_without_a_key_and_nothing_else(service, app):
    """A person then types the key in."""
    from ollm_core.server.guard import Guard

    guard = Guard(app._app, hosts=[], origins=[], api_key="a-long-key")
    for path in FILES:
        assert calls(guard, (path,))[0].status == 200
    assert calls(guard, ("/page/state",))[0].status == 401
    assert calls(guard, ("/page/document/x", b"x"))[0].status == 401


def test_its_state_is_that_of_the_model(app, model):
    """Memory against its limits, and who is there."""
    fields = calls(app, ("/page/state",))[0].fields()
    assert (fields["model"], fields["positions"]) == ("tiny", 256)
    assert fields["memory"]["device"] == {
        "used": model.accounts.device.used, "limit": model.accounts.device.limit,
    }  # fmt: skip
    assert fields["requests"] == {"taken": 0, "most": 12}


def test_its_state_has_memory_over_time_and_what_is_cached(app, service):
    """The newest first, with its name, tokens and bytes; nothing of what it says."""
    body = {"prompt": "swordfish" * 9, "max_tokens": 3, "temperature": 0}
    calls(app, ("/v1/completions", body))
    [made] = calls(app, ("/page/state",))
    fields = made.fields()
    assert b"swordfish" not in made.data
    newest = fields["cached"][0]
    assert newest["tokens"] in (83, 84)
    assert newest["bytes"] == service.model.sequence_bytes(84) > 0
    assert newest["place"] == "this run"
    assert re.fullmatch("[0-9a-f]{8}", newest["name"])
    ago, device, host = fields["history"]["samples"][-1]
    assert ago < 60
    assert 0 < device <= fields["memory"]["device"]["limit"]
    assert 0 <= host <= fields["memory"]["host"]["limit"]


@pytest.mark.parametrize(
    ("name", "data", "text"),
    [
        ("a.txt", "héllo\n".encode(), "héllo"),
        ("a.html", b"<p>hello <b>you</b><script>x</script></p>", "hello you"),
        ("etc%2Fpasswd", b"plain", "plain"),
    ],
)
def test_a_document_is_read_and_counted(app, model, name, data, text):
    """By what it is; its name is no path."""
    fields = calls(app, (f"/page/document/{name}", data))[0].fields()
    assert fields["text"] == text
    assert fields["tokens"] == len(model.tokenizer(text)["input_ids"])
    assert fields["plan"]["seconds"] == pytest.approx(fields["tokens"] / 10)
    assert fields["plan"]["fits"]


@pytest.mark.parametrize("data", [b"", b"\x00\x01\x02", b"%PDF-1.4 nothing", b"x" * 100_001])
def test_what_has_no_text_is_told(app, data):
    """In one line, without a path of the server's."""
    [made] = calls(app, ("/page/document/a.bin", data))
    assert made.status in (400, 413)
    assert "/work" not in made.fields()["error"]["message"]


def test_questions_are_answered_in_one_stream(app, model):
    """Each as alone, on what they share."""
    questions = ["one?", "two two?", "three?"]
    body = {"document": "A document.", "questions": questions, "max_tokens": 5}
    [made] = calls(app, ("/page/ask", body))
    found = [""] * 3
    *events, end = made.events()
    for event in events:
        for choice in event["choices"]:
            found[choice["index"]] += choice["delta"].get("content") or ""
    from ollm_core.serving.request import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=5)
    alone = [model.ask("A document.", [one], sampling)[0].text for one in questions]
    assert found == alone
    assert end == "[DONE]"


@pytest.mark.parametrize(
    "fields",
    [
        {"document": 3}, {"questions": "x"}, {"questions": [1]}, {"questions": []},
        {"questions": [" "]}, {"questions": ["x"] * 257}, {"document": "x" * 300},
        {"max_tokens": 0}, {"max_tokens": "x"},
    ],
)  # fmt: skip
def test_questions_that_cannot_be_are_refused(app, fields):
    """With a status."""
    body = {"document": "x", "questions": ["y"], "max_tokens": 5}
    [made] = calls(app, ("/page/ask", {**body, **fields}))
    assert made.status == 400
    assert made.fields()["error"]["message"]


def until(is_so):
    """It is."""
    end = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.02)


@contextmanager
def shown(service):
    """The page in a browser; nothing it logs is an error."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    if CHROMIUM is None:
        pytest.skip("needs chromium")
    with Running(service) as running, playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        sheet = browser.new_page()
        faults = []
        sheet.on("pageerror", lambda error: faults.append(str(error)))
        sheet.on("console", lambda told: faults.append(told.text))
        sheet.goto(running.url)
        until(lambda: sheet.inner_text("#model") == service.name)
        yield sheet
        browser.close()
        assert faults == []


@pytest.fixture
def sheet(service):
    """The page in a browser."""
    with shown(service) as sheet:
        yield sheet


def test_a_person_asks_by_keyboard(sheet):
    """Several questions on a document; answers, then decisions, then another document."""
    sheet.set_input_files("#file", {"name": "a.txt", "mimeType": "text/plain", "buffer": b"hello"})
    until(lambda: sheet.inner_text("#file-told").startswith("a.txt: 5 tokens of the model's 256"))
    sheet.focus("#questions")
    sheet.keyboard.type("one?\ntwo?")
    sheet.fill("#most", "5")
    sheet.focus("#go")
    sheet.keyboard.press("Enter")
    until(lambda: sheet.inner_text("#state").startswith("Done. 10 tokens"))
    assert [one.inner_text() for one in sheet.query_selector_all("#answers h3")] == ["one?", "two?"]
    assert all(one.inner_text() for one in sheet.query_selector_all("#answers li p:first-of-type"))
    assert sheet.get_attribute("#device-meter", "value") != "0"
    sheet.click("#remove")
    assert sheet.inner_text("#file-told") == ""
    sheet.set_input_files(
        "#file", {"name": "b.txt", "mimeType": "text/plain", "buffer": b"x" * 300}
    )
    until(lambda: "more than the model's 256" in sheet.inner_text("#file-told"))


def test_what_a_model_thinks_is_folded_away(tmp_path):
    """It stands before the answer, for who opens it."""
    with (
        load(make_thinking(tmp_path / "thinking"), device="cpu") as model,
        Service(model, "thinking", None, Defaults(max_tokens=60)) as service,
        shown(service) as sheet,
    ):
        sheet.fill("#questions", "1 + 2?")
        sheet.click("#go")
        until(lambda: sheet.inner_text("#state").startswith("Done."))
        assert sheet.inner_text("#answers li > p:first-of-type") == ANSWER
        assert not sheet.is_visible("#answers details p")
        sheet.click("#answers summary")
        assert sheet.inner_text("#answers details p") == THOUGHT


def test_an_answer_can_be_stopped(sheet, service):
    """And its place is free."""
    sheet.fill("#questions", "x")
    sheet.fill("#most", "200")
    sheet.click("#go")
    sheet.click("#stop")
    until(lambda: sheet.inner_text("#state") == "Stopped.")
    until(lambda: not service.places.num_taken)


def test_memory_is_drawn_and_cached_texts_are_listed(sheet):
    """With words for who does not see the plot."""
    sheet.fill("#questions", "What is drawn?")
    sheet.fill("#most", "3")
    sheet.click("#go")
    until(lambda: sheet.inner_text("#state").startswith("Done."))
    until(lambda: sheet.query_selector_all("#cached tbody tr"))
    points = sheet.get_attribute("#device-line", "points").split()
    assert len(points) >= 2
    assert points[-1].startswith("600.0,")
    assert all(0 <= float(one.split(",")[1]) <= 100 for one in points)
    assert re.match(r"Device memory: .+ of .+, at most .+ in the last \d+ (s|min)",
                    sheet.inner_text("#device-told"))  # fmt: skip
    named = sheet.get_attribute("svg", "aria-labelledby").split()
    assert all(sheet.query_selector(f"#{one}").text_content().strip() for one in named)


def test_every_control_has_a_name(sheet):
    """For who hears the page; and the page fits a phone."""
    for control in sheet.query_selector_all("button, input, textarea, meter, progress"):
        name = control.evaluate(
            "one => one.getAttribute('aria-label') || one.textContent || "
            "[...(one.labels || [])].map(label => label.textContent).join()"
        )
        assert name.strip(), control.evaluate("one => one.outerHTML")
    sheet.set_viewport_size({"width": 320, "height": 640})
    width = sheet.evaluate("() => document.documentElement.scrollWidth")
    assert width <= 320
