"""Config files: where they are looked for, and what is refused of them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ollm_core.cli.config_files import (
    MAX_BYTES,
    ConfigFile,
    config_files,
    project_file,
    user_file,
)
from ollm_core.errors import InputError


@pytest.fixture
def project(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that is the current one, in which no file is yet."""
    (tmp_path / "project/src").mkdir(parents=True)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    monkeypatch.chdir(tmp_path / "project/src")
    return tmp_path / "project"


def test_the_nearest_file_above_is_the_projects(project: Path):
    """One in the current directory goes before it."""
    assert project_file() is None
    (project / "ollm.toml").touch()
    assert project_file() == project / "ollm.toml"
    (project / "src/ollm.toml").touch()
    assert project_file() == project / "src/ollm.toml"


def test_the_search_ends_at_a_repository(project: Path):
    """What is around it is another project's."""
    (project / "ollm.toml").touch()
    (project / "src/.git").mkdir()
    assert project_file() is None


def test_the_search_ends_at_home(project: Path, monkeypatch: pytest.MonkeyPatch):
    """Home itself is looked at."""
    monkeypatch.setenv("HOME", str(project))
    (project.parent / "ollm.toml").touch()
    assert project_file() is None
    (project / "ollm.toml").touch()
    assert project_file() == project / "ollm.toml"


def test_a_directory_of_all_users_is_not_searched(project: Path):
    """As /tmp is: anybody could have put a file there. If you stand in it, you have it."""
    project.chmod(0o1777)
    (project / "ollm.toml").touch()
    assert project_file() is None
    os.chdir(project)
    assert project_file() == project / "ollm.toml"


def test_a_directory_that_is_gone_has_no_file(project: Path, monkeypatch: pytest.MonkeyPatch):
    """Nor is it an error."""
    gone = project / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert project_file() is None


def test_the_users_file_is_where_the_platform_has_it(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """By XDG's variable, or below home; a relative path means nothing."""
    assert user_file() == tmp_path / "xdg/ollm/config.toml"
    monkeypatch.delenv("XDG_CONFIG_HOME")
    assert user_file() == tmp_path / "home/.config/ollm/config.toml"
    monkeypatch.setenv("XDG_CONFIG_HOME", "here")
    assert user_file() is None


def test_a_users_file_that_others_can_write_is_refused(project: Path):
    """It could run code. A project's may be anybody's, and is read."""
    for path in (user_file(), project / "ollm.toml"):
        assert path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("seed = 1")
    assert [(one.is_project, one.private) for one in config_files()] == [
        (False, False),
        (True, False),
    ]
    (project / "ollm.toml").chmod(0o666)
    user = user_file()
    assert user
    user.chmod(0o600)
    assert [(one.is_project, one.private) for one in config_files()] == [
        (False, True),
        (True, False),
    ]
    user.chmod(0o602)
    with pytest.raises(InputError, match="another user can change it"):
        config_files()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff", "not UTF-8"),
        (b"#" * (MAX_BYTES + 1), f"at most {MAX_BYTES} bytes"),
        (b"a = ", "not TOML: "),
        (b"a = 1\na = 2", "not TOML: "),
        (b"a = " + b"[" * 60_000, "TOML nested too deeply"),
        (b"a = " + b"9" * 60_000, "not TOML: "),
        (b"\0", "not TOML: "),
    ],
)
def test_what_is_no_config_is_one_line(project: Path, content: bytes, message: str):
    """Which names the file."""
    (project / "ollm.toml").write_bytes(content)
    with pytest.raises(InputError) as refused:
        list(config_files()[0].entries())
    assert message in refused.value.message
    assert refused.value.message.startswith(f"{project}/ollm.toml: ")
    assert "\n" not in str(refused.value.message)


@pytest.mark.parametrize("kind", ["fifo", "directory", "dangling"])
def test_what_is_no_file_is_refused(project: Path, kind: str):
    """And never waited for."""
    path = project / "ollm.toml"
    {
        "fifo": lambda: os.mkfifo(path),
        "directory": path.mkdir,
        "dangling": lambda: path.symlink_to("nowhere"),
    }[kind]()
    with pytest.raises(InputError, match=r"ollm\.toml: (need a regular file|cannot be read)"):
        config_files()


def test_each_entry_has_its_line(tmp_path: Path):
    """Where it stands as people write it; else the file alone."""
    text = 'a = 1\n# b = 0\n[run] # of a run\n"a" = 2\nserve.a = 3\n[empty]\n[plan]\n  a=4\n'
    path = tmp_path / "ollm.toml"
    entries = list(ConfigFile(path, True, True, text).entries())
    assert [(one.table, one.key, one.value, one.where) for one in entries] == [
        ("", "a", 1, f"{path}:1"),
        ("run", "a", 2, f"{path}:4"),
        ("run", "serve", {"a": 3}, str(path)),
        ("empty", "", None, f"{path}:6"),
        ("plan", "a", 4, f"{path}:8"),
    ]
