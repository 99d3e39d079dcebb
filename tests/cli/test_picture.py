"""`ollm plan --plot FILE`: a picture with what the plan says, or one line that says why not."""

from __future__ import annotations

import sys

import pytest

import ollm
from ollm_core import InputError
from ollm_core.cli.main import main
from ollm_core.cli.picture import save
from ollm_core.memory.kinds import OTHER_COLOUR, MemoryKind, colour_of

pytestmark = pytest.mark.usefixtures("home")

GPU = {"device": "cuda", "device_memory": "40MB", "host_memory": "1GB"}


@pytest.fixture(scope="module")
def plan():
    """One with several kinds in both memories."""
    return ollm.plan("smollm2-135M", context="8k", kv="disk", **GPU)


def shares(path):
    """Which share of a picture's points has each colour, as #rrggbb."""
    from matplotlib.image import imread

    points = (imread(path)[:, :, :3] * 255).round().astype(int)
    values = (points[:, :, 0] << 16) + (points[:, :, 1] << 8) + points[:, :, 2]
    return lambda colour: float((values == int(colour[1:], 16)).mean())


def test_every_kind_is_in_the_picture(plan, tmp_path):
    """In its colour, those that hold more with more of it; nothing that is not held."""
    assert len(plan.device_bytes) > 2
    save(plan, tmp_path / "run.png")
    share = shares(tmp_path / "run.png")
    held = {}
    for moment in plan.moments:
        for parts, peak in (
            (moment.device, plan.device_peak_bytes),
            (moment.host, plan.host_peak_bytes),
        ):
            for kind, num_bytes in parts.items():
                held[kind] = max(held.get(kind, 0), num_bytes / peak)
    for kind, part in held.items():
        if part > 0.02:
            assert share(colour_of(kind)) > 0.0005, kind
    for kind in {kind for kind in MemoryKind if kind.colour != OTHER_COLOUR} - held.keys():
        assert share(colour_of(kind)) < 0.0005, kind
    assert held["resident weights"] > held["layer"]
    assert share(MemoryKind.RESIDENT_WEIGHTS.colour) > share(MemoryKind.LAYER.colour)


@pytest.mark.parametrize("name", ["run.svg", "run.pdf", "RUN.PNG"])
def test_formats(plan, tmp_path, name):
    """The file's ending says which."""
    save(plan, tmp_path / name)
    start = {".svg": b"<?xml", ".pdf": b"%PDF", ".png": b"\x89PNG"}
    assert (tmp_path / name).read_bytes().startswith(start[name[-4:].lower()])


def test_the_verb_draws_into_a_file(tmp_path, capfd):
    """The table is printed as without; with --json stdout has one object and nothing else."""
    options = ["--device", "cuda", "--device-memory", "40MB", "--host-memory", "1GB"]
    for extra in ([], ["--json"]):
        picture = tmp_path / f"run{len(extra)}.png"
        with pytest.raises(SystemExit) as ended:
            main(["plan", "smollm2-135M", *options, "--plot", str(picture), *extra])
        out, err = capfd.readouterr()
        assert not ended.value.code
        assert picture.is_file()
        assert err == f"drawn in {picture}\n"
        assert "|" not in out
        assert out.startswith("{" if extra else "model ")


@pytest.mark.parametrize("name", ["run.jpeg", "run", "smollm2-135M"])
def test_other_names_are_refused_before_planning(name, capfd):
    """In one line and a hint, also where the model was taken for the file."""
    with pytest.raises(SystemExit) as ended:
        main(["plan", "no-such-model", "--plot", name])
    _, err = capfd.readouterr()
    assert ended.value.code == 2
    assert f"{name!r} is no name for a picture" in err.splitlines()[0]
    assert err.splitlines()[1].startswith("hint: one that ends in .png or .svg or .pdf")


def test_without_matplotlib(plan, tmp_path, monkeypatch):
    """What to install."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match="needs matplotlib") as caught:
        save(plan, tmp_path / "run.png")
    assert "ollm-core[plot]" in caught.value.hint
    assert not (tmp_path / "run.png").exists()


def test_a_place_that_cannot_be_written(plan, tmp_path):
    """Is named."""
    with pytest.raises(InputError, match="No such file or directory"):
        save(plan, tmp_path / "none" / "run.png")
