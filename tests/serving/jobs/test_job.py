"""A batch: every row once, whatever happens; nothing of another batch is touched."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import tracemalloc

import pytest
import torch
from batch_rows import InstantModel, chat, read_lines, row, texts, write_rows
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ollm_core.api import load
from ollm_core.errors import DoesNotFitError, InputError, NotFiniteError, ReadError
from ollm_core.serving.jobs import rows as jobs
from ollm_core.serving.jobs.job import BatchJob
from ollm_core.serving.jobs.rows import AHEAD

SETTINGS = {"dtype": "float32"}


@pytest.fixture
def paths(tmp_path):
    """Input, output, and where errors go."""
    return tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "out.errors.jsonl"


def run(paths, model=None, **options):
    """One run to its end; -> its progress."""
    options = {"settings": SETTINGS, **options}
    with BatchJob(*paths[:2], **options) as job:
        return job.run(model or InstantModel(), "tiny")


def names_in(directory):
    """Of all files."""
    return sorted(path.name for path in directory.iterdir())


def test_a_batch(paths):
    """Every row has an answer in OpenAI's form, and nothing else is left behind."""
    write_rows(paths[0], [row(f"r{n}", (n, 5)) for n in range(40)])
    told = run(paths)
    assert (told.num_rows, told.num_answered, told.num_failed, told.num_left) == (40, 40, 0, 0)
    assert told.num_prompt_tokens == 80
    assert texts(paths[1]) == {f"r{n}": str(n + 5) for n in range(40)}
    assert names_in(paths[0].parent) == ["in.jsonl", "out.jsonl"]
    answer = read_lines(paths[1])[0]
    assert answer.keys() == {"id", "custom_id", "response", "error"}
    assert answer["error"] is None
    assert answer["response"]["status_code"] == 200
    assert answer["response"]["body"]["usage"]["total_tokens"] == 3


BAD = {
    "{oops": ("invalid_json_line", None),
    "[" * 1_000_000: ("invalid_json_line", None),
    '{"custom_id": "nan", "x": NaN}': ("invalid_json_line", None),
    '{"custom_id": ' + "9" * 5000 + "}": ("invalid_json_line", None),
    "[1]": ("invalid_json_line", None),
    '{"custom_id": "\\ud800"}': ("missing_custom_id", None),
    json.dumps({"url": "/v1/completions"}): ("missing_custom_id", None),
    json.dumps(row(3)): ("missing_custom_id", None),
    json.dumps(row("")): ("missing_custom_id", None),
    json.dumps(row("good", (1,))): ("duplicate_custom_id", "good"),
    json.dumps(row("url", url="/v1/embeddings")): ("invalid_url", "url"),
    json.dumps({**row("method"), "method": "GET"}): ("invalid_request", "method"),
    json.dumps({**row("list"), "body": []}): ("invalid_request", "list"),
    json.dumps(row("long", (5,) * 101)): ("context_length_exceeded", "long"),
    json.dumps(row("unknown", tempreture=1)): ("unknown_parameter", "unknown"),
    json.dumps(row("hot", temperature="hot")): ("invalid_request", "hot"),
    json.dumps(row("nan", (13,))): ("model_failed", "nan"),
    json.dumps(row("large", (14,))): ("does_not_fit", "large"),
}


def blame(request):
    """What two of the rows above fail by."""
    if 13 in request.token_ids:
        return NotFiniteError("logits are not finite")
    if 14 in request.token_ids:
        return DoesNotFitError("cpu: need 2 MB", memory="cpu", needed_bytes=2)
    return None


def test_bad_rows_do_not_stop_the_rest(paths):
    """Each has one line, with its place in the input; the good ones are answered."""
    lines = [json.dumps(row("good", (1, 2))), *BAD, json.dumps(row("last", (3,)))]
    write_rows(paths[0], lines)
    told = run(paths, InstantModel(fails=blame))
    assert texts(paths[1]) == {"good": "3", "last": "3"}
    errors = read_lines(paths[2])
    found = {one["error"]["line"]: (one["error"]["code"], one["custom_id"]) for one in errors}
    assert found == dict(enumerate(BAD.values(), start=2))
    assert len(errors) == len(BAD) == told.num_failed
    assert {one["response"] for one in errors} == {None}
    assert run(paths).num_found == len(lines)


class Killed(BaseException):
    """The end of a process."""


ROWS = st.lists(
    st.one_of(
        st.integers(0, 12).map(lambda n: json.dumps(row(f"r{n}", (n, 20)))),
        st.sampled_from([*BAD][:4]).filter(lambda line: len(line) < 9000),
    ),
    max_size=20,
)
KILLS = st.lists(
    st.tuples(st.integers(0, 12), st.binary(max_size=12), st.binary(max_size=12), st.booleans()),
    max_size=5,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(ROWS, KILLS, st.integers(0, 99))
def test_killed_anywhere_it_goes_on_with_exactly_the_rest(tmp_path, lines, kills, seed):
    """No row twice and none lost, whatever a torn last line looks like."""
    directory = tmp_path / "job"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    paths = directory / "in.jsonl", directory / "out.jsonl", directory / "out.errors.jsonl"
    write_rows(paths[0], lines)
    for steps, torn_answer, torn_error, closes in kills:
        left = itertools.count(steps, -1)

        def fail(_, left=left):
            if not next(left):
                raise Killed
            return

        job = BatchJob(*paths[:2], settings=SETTINGS)
        try:
            job.run(InstantModel(seed, fail), "tiny")
        except Killed:
            if not closes:  # nobody cleans up, and the disk has a part of a line
                job._opened.pop_all()
                job._answers.close()
                job._refusals.close()
                for path, torn in ((paths[1], torn_answer), (paths[2], torn_error)):
                    with path.open("ab") as file:
                        file.write(torn.replace(b"\n", b"?"))
        finally:
            job.close()
    run(paths)
    good = {f"r{n}": str(n + 20) for n in range(13) if f'"r{n}"' in "".join(lines)}
    assert texts(paths[1]) == good
    errors = [one["error"]["line"] for one in read_lines(paths[2])]
    seen, bad = set(), []
    for number, line in enumerate(lines, start=1):
        if line in seen or not line.startswith('{"custom_id": "r'):
            bad.append(number)
        seen.add(line)
    assert sorted(errors) == bad
    assert set(names_in(directory)) <= {"in.jsonl", "out.jsonl", "out.errors.jsonl"}


def begin(paths, num_answers=3, num_rows=9):
    """An output that was broken off."""
    write_rows(paths[0], [row(f"r{n}", (n,)) for n in range(num_rows)])

    def stop(told):
        if told.num_answered == num_answers:
            raise Killed

    with pytest.raises(Killed), BatchJob(*paths[:2], settings=SETTINGS) as job:
        job.run(InstantModel(), "tiny", on_progress=stop)
    return paths[1].read_bytes()


def test_other_settings_are_refused(paths):
    """The error names them; with `anyway` it goes on."""
    before = begin(paths)
    with pytest.raises(InputError, match="dtype float32, now bfloat16") as refused:
        run(paths, settings={"dtype": "bfloat16"})
    assert "--anyway" in refused.value.hint
    assert paths[1].read_bytes() == before
    assert run(paths, settings={"dtype": "bfloat16"}, anyway=True).num_left == 0
    assert len(texts(paths[1])) == 9


def test_another_input_is_refused(paths):
    """Also one that only has more rows, until it is told to go on."""
    begin(paths)
    with paths[0].open("a") as file:
        file.write(json.dumps(row("more", (50,))) + "\n")
    with pytest.raises(InputError, match="was begun with other settings: input "):
        run(paths)
    run(paths, anyway=True)
    assert len(texts(paths[1])) == 10


def test_settings_of_a_run_without_answers_do_not_count(paths):
    """A mistake in the first command is put right in the second."""
    write_rows(paths[0], [row("a")])
    with pytest.raises(ReadError):
        run(paths, InstantModel(fails=lambda _: ReadError("disk: read failed")))
    assert names_in(paths[0].parent) == ["in.jsonl"]
    run(paths, settings={"dtype": "bfloat16"})


def test_an_output_of_something_else_is_refused_as_it_is(paths):
    """Answers that nothing is known of, and no answers at all."""
    write_rows(paths[0], [row("a"), row("b")])
    for content in ('{"custom_id": "a"}\n{"cust', "text\n", "text"):
        paths[1].write_text(content)
        with pytest.raises(InputError, match=r"nothing says how|is not an answer"):
            run(paths)
        assert paths[1].read_text() == content


def test_a_complete_batch_is_complete_again(paths):
    """A script may say the same once more: nothing is computed, or refused."""
    write_rows(paths[0], [row("a"), row("b")])
    run(paths)
    before, model = paths[1].read_bytes(), InstantModel()
    told = run(paths, model, settings={"dtype": "another"})
    assert (told.num_found, told.num_left, model.num_asked) == (2, 0, 0)
    assert paths[1].read_bytes() == before


def test_two_runs_on_one_output(paths):
    """The second is refused at once, and the first comes to its end."""
    write_rows(paths[0], [row("a"), row("b")])
    with BatchJob(*paths[:2], settings=SETTINGS) as job:
        with pytest.raises(InputError, match="another run is writing there"):
            run(paths)
        job.run(InstantModel(), "tiny")
        with pytest.raises(InputError, match="the batch has been run"):
            job.run(InstantModel(), "tiny")
    assert len(texts(paths[1])) == 2


def test_files_are_three(paths):
    """By whatever name."""
    write_rows(paths[0], [row("a")])
    before = paths[0].read_bytes()
    link = paths[0].with_name("link.jsonl")
    link.symlink_to(paths[0])
    hard = paths[0].with_name("hard.jsonl")
    os.link(paths[0], hard)
    for output, errors in (
        (paths[0], None),
        (link, None),
        (hard, None),
        (paths[1], paths[0]),
        (paths[1], paths[1]),
    ):
        with pytest.raises(InputError, match=r"name another file|is the"):
            BatchJob(paths[0], output, errors, settings=SETTINGS)
    assert paths[0].read_bytes() == before


def test_an_input_that_changes_is_told(paths, monkeypatch):
    """What was answered stays; the batch does not count as complete."""
    monkeypatch.setattr(jobs, "AHEAD", 8)
    write_rows(paths[0], [row(f"r{n}", (n,)) for n in range(50)])
    with BatchJob(*paths[:2], settings=SETTINGS) as job:
        write_rows(paths[0], [row(f"s{n}", (n,)) for n in range(50)])
        with pytest.raises(InputError, match="was changed while it was read"):
            job.run(InstantModel(), "tiny")
    with pytest.raises(InputError, match="was begun with other settings: input"):
        run(paths)


@pytest.mark.parametrize("error", [ReadError("disk: read failed"), OSError(5, "I/O error")])
def test_what_no_row_is_to_blame_for_ends_the_run(paths, error):
    """And the next one goes on."""
    write_rows(paths[0], [row(f"r{n}", (n,)) for n in range(9)])
    model = InstantModel(fails=lambda request: error if 5 in request.token_ids else None)
    with pytest.raises(type(error)):
        run(paths, model)
    assert not paths[2].exists()
    run(paths)
    assert len(texts(paths[1])) == 9


@pytest.mark.parametrize("num_rows", [9, 90])
def test_a_full_disk_is_told_and_rows_are_left(paths, num_rows):
    """A row that finds no room for its keys and values is left to the next run, not told of as a
    bad one. Where none finds any, the run soon ends.
    """
    write_rows(paths[0], [row(f"r{n}", (n,)) for n in range(num_rows)])
    full = DoesNotFitError("disk: no space left")
    model = InstantModel(fails=lambda request: full if max(request.token_ids) > 3 else None)
    with pytest.raises(DoesNotFitError):
        run(paths, model)
    assert model.num_asked <= 4 + jobs._MOST_IN_VAIN + 4
    assert not paths[2].exists()
    run(paths)
    assert len(texts(paths[1])) == num_rows


def test_rows_are_read_as_they_are_wanted(paths, monkeypatch):
    """No more than AHEAD, and none while those before have many tokens."""
    write_rows(paths[0], [row(f"r{n}", (n % 50,) * 9) for n in range(AHEAD + 100)])
    model = InstantModel()
    run(paths, model)
    assert model.most_live == AHEAD
    paths[1].unlink()
    monkeypatch.setattr(jobs, "AHEAD_TOKENS", 90)
    model = InstantModel()
    run(paths, model)
    assert model.most_live == 10


def peak(paths, num_rows, monkeypatch):
    """Bytes that Python's objects take at most in a run over so many rows."""
    write_rows(paths[0], [row(f"{n:060}", (n % 50,) * 20) for n in range(num_rows)])
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", lambda _: None)  # memory is measured here, and not the disk
        tracemalloc.start()
        try:
            told = run(paths)
            again = run(paths)
            found = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert (told.num_answered, again.num_found) == (num_rows, num_rows)
    paths[1].unlink()
    return found


def check_memory(paths, monkeypatch, fewer, more):
    """Growth from one number of rows to the other: the names' marks, 72 bytes each at most while
    their table grows.
    """
    monkeypatch.setattr(jobs, "AHEAD", 16)
    peak(paths, 50, monkeypatch)
    growth = peak(paths, more, monkeypatch) - peak(paths, fewer, monkeypatch)
    assert growth < 72 * (more - fewer)


def test_memory_does_not_grow_with_rows(paths, monkeypatch):
    """A row in memory would take thousands of bytes."""
    check_memory(paths, monkeypatch, 500, 2500)


@pytest.mark.soak
def test_memory_of_a_large_batch(paths, monkeypatch):
    """50,000 rows."""
    check_memory(paths, monkeypatch, 1000, 50_000)


def alone(directory, prompt, num_new):
    """Greedy text of one prompt, as transformers itself has it in float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(
        **inputs, max_new_tokens=num_new, do_sample=False, temperature=None, top_p=None
    )
    return tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)


def test_a_model_answers_as_it_does_alone(tiny_chat, paths):
    """Chats and completions together, from Python; a text that is too long is told."""
    rows = [row(f"p{n}", f"Text {n}:", temperature=0, max_tokens=9) for n in range(5)]
    rows += [chat("c", "why?", temperature=0), chat("long", "x" * 300), row("n", "a", n=2, seed=3)]
    write_rows(paths[0], rows)
    with load(tiny_chat, device="cpu", dtype="float32") as model:
        told = model.batch(*paths[:2], max_new_tokens=7)
    assert (told.num_answered, told.num_failed) == (7, 1)
    found = texts(paths[1])
    assert found["c"] == alone(tiny_chat, "[user]why?[assistant]", 7)
    for number in range(5):
        assert found[f"p{number}"] == alone(tiny_chat, f"Text {number}:", 9)
    [error] = read_lines(paths[2])
    assert (error["custom_id"], error["error"]["code"]) == ("long", "context_length_exceeded")
    two = next(one for one in read_lines(paths[1]) if one["custom_id"] == "n")
    assert [one["index"] for one in two["response"]["body"]["choices"]] == [0, 1]
    assert two["response"]["body"]["model"] == "tiny"


def test_a_models_own_settings_are_kept(tiny_chat, paths):
    """Another answer's length would be another answer."""
    write_rows(paths[0], [row(f"r{n}", "a", temperature=0) for n in range(3)])

    def stop(told):
        if told.num_answered == 1:
            raise Killed

    with load(tiny_chat, device="cpu", dtype="float32") as model:
        with pytest.raises(Killed):
            model.batch(*paths[:2], max_new_tokens=3, on_progress=stop)
        with pytest.raises(InputError, match="max_new_tokens 3, now 4"):
            model.batch(*paths[:2], max_new_tokens=4)
        assert model.batch(*paths[:2], max_new_tokens=3).num_answered == 2
        model.batch(*paths[:2], max_new_tokens=3)
    with pytest.raises(InputError, match="need an open model"):
        model.batch(*paths[:2])
