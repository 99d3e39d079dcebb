"""Names for fingerprints."""

from pathlib import Path

from ollm_core.model.names import known_names, remember_name


def test_names(home):
    """The last one counts; a snapshot in the hub's cache has its repository's; others their own."""
    assert known_names() == {}
    remember_name("a" * 64, Path("/models/first"))
    remember_name("a" * 64, Path("/models/second"))
    remember_name("b" * 64, Path("/hub/models--org--name/snapshots/0123456789"))
    remember_name("c" * 64, Path("/models/with\nlines"))
    assert known_names() == {"a" * 64: "second", "b" * 64: "org/name"}
    assert (home / ".cache/ollm/identity").stat().st_mode & 0o777 == 0o700


def test_where_nothing_can_be_kept(home):
    """The model is opened all the same."""
    home.mkdir()
    (home / ".cache").touch()
    remember_name("a" * 64, Path("/models/first"))
    assert known_names() == {}
