"""`ollm adapter new` in a directory without a clone, and what `copier` makes and updates later."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import yaml

from ollm_conformance.new_adapter import CHOICES, OPTIONS, PUBLISHED, TEMPLATE
from ollm_core.cli.main import main

ROOT = Path(__file__).parents[1]
QUESTIONS = {
    name: question
    for name, question in yaml.safe_load((TEMPLATE / "copier.yml").read_text()).items()
    if not name.startswith("_") and question.get("when", True)
}
OLMO2 = ("olmo2", "--repo", "allenai/OLMo-2-0425-1B-Instruct", "--defaults")


@pytest.fixture
def new(capsys, tmp_path, monkeypatch):
    """Runs `ollm adapter new` in an empty directory; -> exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def new(*arguments):
        with pytest.raises(SystemExit) as end:
            main(["adapter", "new", *map(str, arguments)])
        captured = capsys.readouterr()
        return int(end.value.code or 0), captured.out, captured.err

    return new


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """One with the template, tagged as this version, to which `gh:ollm-core/ollm-core` leads."""
    directory = tmp_path / "published"
    settings = {
        f"url.file://{directory}.insteadOf": "https://github.com/ollm-core/ollm-core.git",
        "user.name": "Tester",
        "user.email": "tester@example.org",
        "init.defaultBranch": "main",
    }
    monkeypatch.setenv("GIT_CONFIG_COUNT", str(len(settings)))
    for number, (key, value) in enumerate(settings.items()):
        monkeypatch.setenv(f"GIT_CONFIG_KEY_{number}", key)
        monkeypatch.setenv(f"GIT_CONFIG_VALUE_{number}", value)
    shutil.copytree(TEMPLATE, directory / TEMPLATE.relative_to(ROOT))
    shutil.copy(ROOT / "copier.yml", directory)
    git(directory, "init", "--quiet")
    commit(directory, "First")
    git(directory, "tag", PUBLISHED["_commit"])
    return directory


def git(directory, *arguments):
    """What git prints, in `directory`."""
    return subprocess.run(
        ["git", *arguments], cwd=directory, check=True, capture_output=True, text=True
    ).stdout


def run_copier(*arguments):
    """The command `copier`, as an author uses it; without `--trust`, so that it runs no code."""
    command = [sys.executable, "-m", "copier", *map(str, arguments)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def commit(directory, message):
    """All of `directory`."""
    git(directory, "add", "--all")
    git(directory, "commit", "--quiet", "--message", message)


def edit(path, old, new):
    """Replace what is in a file exactly once."""
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


def files(directory):
    """The content of every file, by its path."""
    return {
        path.relative_to(directory).as_posix(): path.read_text()
        for path in directory.rglob("*")
        if path.is_file()
    }


def test_every_question_can_be_answered_by_an_option():
    """A question that is added to the template gets an option, or FAMILY's place."""
    assert ["family", *OPTIONS] == list(QUESTIONS)
    choices = {name: q["choices"] for name, q in QUESTIONS.items() if "choices" in q}
    assert {name: list(offered) for name, offered in CHOICES.items()} == choices


def test_a_project_is_made_and_what_comes_next_is_told(new, tmp_path):
    """One command without a clone: the answers are in the files, and the next steps are shown."""
    code, out, err = new(*OLMO2, "--author", "Ada", "--license", "MIT", "--class-name", "Olmo")
    assert (code, err) == (0, "")
    assert "    cd ollm-adapter-olmo2\n    pip install -e '.[dev]'\n    pytest\n" in out
    (project,) = tmp_path.iterdir()
    assert project.name == "ollm-adapter-olmo2"
    module = (project / "src/ollm_adapter_olmo2/__init__.py").read_text()
    assert "class Olmo(FamilyAdapter)" in module
    assert 'model_types = ("olmo2",)' in module
    assert "Copyright (c) Ada" in (project / "LICENSE").read_text()
    assert project.stat().st_mode & 0o777 == 0o777 & ~_umask()


def _umask():
    now = os.umask(0)
    os.umask(now)
    return now


def test_answers_are_remembered(new, tmp_path):
    """With the public repository and the tag of the installed release, as `copier update` wants."""
    new("qwen3_next", "--model-type", "qwen3_next", "--url", "https://example.org/me/x")
    project = tmp_path / "ollm-adapter-qwen3-next"
    answers = yaml.safe_load((project / ".copier-answers.yml").read_text())
    assert answers == {
        **PUBLISHED,
        "author": "The adapter's author",
        "class_name": "Qwen3NextAdapter",
        "family": "qwen3_next",
        "license": "Apache-2.0",
        "model_type": "qwen3_next",
        "repo": "mistralai/Mistral-7B-Instruct-v0.3",
        "url": "https://example.org/me/x",
    }


@pytest.mark.parametrize("url", ["", "https://example.org/me/ollm-adapter-x"])
def test_what_pypi_shows_of_it(new, tmp_path, url):
    """With an address of its own it has all of them; its README links to no file beside it."""
    assert new("x", "--url", url)[0] == 0
    project = tmp_path / "ollm-adapter-x"
    urls = tomllib.loads((project / "pyproject.toml").read_text())["project"]["urls"]
    own = {"Homepage", "Documentation", "Source", "Issues", "Changelog"}
    assert urls.keys() == {"oLLM"} | (own if url else set())
    assert all(urls[name].startswith(url) for name in own & urls.keys())
    targets = re.findall(r"\]\(([^)]*)", (project / "README.md").read_text())
    assert targets
    assert all(target.startswith("https://") for target in targets)
    assert f"{url}/blob/main/SUPPORT.md" in targets or not url


def test_a_directory_in_use_is_refused(new, tmp_path):
    """One line, exit code 2, and what is there stays as it is."""
    taken = tmp_path / "ollm-adapter-olmo2"
    taken.mkdir()
    (taken / "notes").write_text("mine")
    for arguments in (OLMO2, (*OLMO2, "--out", taken), (*OLMO2, "--out", taken / "notes")):
        code, out, err = new(*arguments)
        assert (code, out) == (2, "")
        assert "is there already and not" in err
        assert err.endswith("hint: choose another directory with --out\n")
    assert files(tmp_path) == {"ollm-adapter-olmo2/notes": "mine"}


def test_an_empty_directory_is_filled(new, tmp_path, monkeypatch):
    """The directory that somebody stands in stays that directory."""
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    before = os.stat(".").st_ino
    code, *_ = new(*OLMO2, "--out", ".")
    assert code == 0
    assert os.stat(".").st_ino == before == (tmp_path / "empty").stat().st_ino
    new(*OLMO2, "--out", tmp_path / "other")
    assert files(tmp_path / "empty") == files(tmp_path / "other")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["My-Family"], "FAMILY 'My-Family': use small letters"),
        (["../x"], "FAMILY '../x': use small letters"),
        (["x" * 300], "cannot be written: File name too long"),
        (["class"], "FAMILY 'class': class is a keyword"),
        (["x", "--license", "GPL-3.0"], "Invalid value for '--license': 'GPL-3.0' is not one of"),
        (["x", "--model-type", "a b"], "--model-type 'a b': use what config.json says"),
        (["x", "--class-name", "x"], "--class-name 'x': use letters"),
        (["x", "--repo", "x"], "--repo 'x': use owner/name"),
        (["x", "--author", "a\nb"], r"--author 'a\nb': use a name of one line"),
        (["x", "--url", "http://x.org/a"], "--url 'http://x.org/a': use https://"),
        (["x", "--out", "no/where"], "is not a directory"),
        ([], "Missing argument 'FAMILY'"),
    ],
)
def test_a_bad_answer_is_one_line(new, tmp_path, arguments, named):
    """It names the option, exit code 2, nothing is made."""
    code, out, err = new(*arguments)
    assert (code, out) == (2, "")
    assert named in err
    assert [line.split(":")[0] for line in err.splitlines()] == ["error", "hint"]
    assert list(tmp_path.iterdir()) == []


def test_on_a_terminal_it_asks_what_no_option_says(tmp_path):
    """Each other question once, with the default as the proposal; --author is not asked for."""
    command = [sys.executable, "-m", "ollm_core.cli", "adapter", "new", "gemma", "--author", "Ada"]
    master, terminal = pty.openpty()
    process = subprocess.Popen(
        command, cwd=tmp_path, stdin=terminal, stdout=terminal, stderr=terminal,
        env={**os.environ, "PROMPT_TOOLKIT_NO_CPR": "1", "TERM": "xterm", "COLUMNS": "200"},
    )  # fmt: skip
    os.close(terminal)
    asked = [name for name in QUESTIONS if name not in ("family", "author")]
    try:
        seen = b""
        for name in asked:
            seen = _read_until(master, QUESTIONS[name]["help"].encode(), seen)
            os.write(master, b"\r")
        seen = _read_until(master, b"README.md there lists", seen)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(master)
    assert QUESTIONS["author"]["help"].encode() not in seen
    answers = yaml.safe_load((tmp_path / "ollm-adapter-gemma/.copier-answers.yml").read_text())
    assert (answers["class_name"], answers["author"]) == ("GemmaAdapter", "Ada")


def _read_until(master, expected, seen):
    end = time.monotonic() + 60
    while expected not in seen:
        assert time.monotonic() < end, f"expected {expected!r} in {seen!r}"
        if select.select([master], [], [], 1)[0]:
            seen += os.read(master, 65536)
    return seen


def test_the_repository_makes_the_same_project(new, repository, tmp_path):
    """`copier copy gh:ollm-core/ollm-core` and `ollm adapter new` write the same files."""
    new(*OLMO2, "--out", "made")
    answers = ("-d", "family=olmo2", "-d", f"repo={OLMO2[2]}")
    run_copier("copy", "--defaults", *answers, "gh:ollm-core/ollm-core", tmp_path / "copied")
    assert files(tmp_path / "copied") == files(tmp_path / "made")


def test_an_update_arrives_and_edits_stay(new, repository, tmp_path):
    """A later release changes CI and the class; the author has written its layer meanwhile."""
    new(*OLMO2)
    project = tmp_path / "ollm-adapter-olmo2"
    git(project, "init", "--quiet")
    module = project / "src/ollm_adapter_olmo2/__init__.py"
    edit(module, "        return tiny()\n", "        return own_tiny()\n")
    (project / "src/ollm_adapter_olmo2/own.py").write_text("own = True\n")
    commit(project, "Ours")
    template = repository / TEMPLATE.relative_to(ROOT) / "project"
    edit(template / ".github/workflows/ci.yml.jinja", '"3.13"', '"3.13", "3.14"')
    edit(
        template / "src/{{ package }}/__init__.py.jinja",
        '    """What a model is made of',
        '    """What an {{ family }} model is made of',
    )
    commit(repository, "Second")
    git(repository, "tag", "v99.0.0")
    run_copier("update", "--defaults", project)
    assert '"3.13", "3.14"' in (project / ".github/workflows/ci.yml").read_text()
    text = module.read_text()
    assert '"""What an olmo2 model is made of' in text
    assert "return own_tiny()" in text
    assert "<<<<<<<" not in text
    changed = {
        ".copier-answers.yml",
        ".github/workflows/ci.yml",
        "src/ollm_adapter_olmo2/__init__.py",
    }
    assert {line[3:] for line in git(project, "status", "--porcelain").splitlines()} == changed
    answers = yaml.safe_load((project / ".copier-answers.yml").read_text())
    assert (answers["_commit"], answers["_src_path"]) == ("v99.0.0", PUBLISHED["_src_path"])


def test_a_release_is_published_after_the_tests(new, tmp_path):
    """By PyPI's trust in one job of the workflow, of what was built from the tag's version."""
    new(*OLMO2)
    project = tmp_path / "ollm-adapter-olmo2"
    workflows = project / ".github/workflows"
    tests, publishing = (
        yaml.load((workflows / name).read_text(), yaml.BaseLoader)
        for name in ("ci.yml", "publish.yml")
    )
    assert "workflow_call" in tests["on"]
    jobs = publishing["jobs"]
    assert publishing["on"] == {"release": {"types": ["published"]}}
    assert jobs["test"]["uses"] == "./.github/workflows/ci.yml"
    assert (jobs["build"]["needs"], jobs["publish"]["needs"]) == ("test", "build")
    trusted = [name for name, job in jobs.items() if "id-token" in json.dumps(job)]
    assert trusted == ["publish"]
    steps = [step["uses"] for step in jobs["publish"]["steps"]]
    assert [step.split("@")[0] for step in steps] == [
        "actions/download-artifact",
        "pypa/gh-action-pypi-publish",
    ]
    (tagged,) = [s["run"] for s in jobs["build"]["steps"] if "GITHUB_REF_NAME" in s.get("run", "")]
    (project / "dist").mkdir()
    (project / "dist/ollm_adapter_olmo2-0.1.0.tar.gz").touch()
    for tag, code in (("v0.1.0", 0), ("v0.1.1", 1)):
        environment = {**os.environ, "GITHUB_REF_NAME": tag}
        ran = subprocess.run(["bash", "-c", tagged], cwd=project, env=environment, check=False)
        assert ran.returncode == code
