"""What built distributions carry, and that the installed ones are those. Run by check_wheels.sh:

    python -I check_wheels.py DIST CHECKOUT

DIST has a source distribution and a wheel of each; they are installed in the Python that runs this.
"""

from __future__ import annotations

import importlib
import sys
import tarfile
import zipfile
from collections.abc import Iterable
from importlib.metadata import PathDistribution, distribution
from pathlib import Path, PurePosixPath

URLS = {"Homepage", "Documentation", "Source", "Issues", "Changelog"}
NO_HOME = "ollm_adapter_mistral"
"""Just made, without an address of its own."""
POINTS = {
    "ollm_core": {("console_scripts", "ollm")},
    "ollm_conformance": {
        ("ollm.adapters", "conformance"),
        ("pytest11", "ollm_conformance"),
    },
    "ollm_adapter_gpt_oss": {("ollm.adapters", "gpt-oss")},
    "ollm_adapter_llama": {("ollm.adapters", "llama")},
    "ollm_adapter_qwen3_next": {("ollm.adapters", "qwen3-next")},
    "ollm_adapter_transformers": {("ollm.adapters", "transformers")},
    "llm_ollm": {("llm", "ollm")},
    NO_HOME: {("ollm.adapters", "mistral")},
}
TEMPLATE = "ollm_conformance/template"


def check_wheel(path: Path) -> str:
    """-> the name of its package. Raises AssertionError for what is missing or too much."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        package, version, *_ = path.name.split("-")
        described = PathDistribution(zipfile.Path(archive, f"{package}-{version}.dist-info/"))
        metadata, declared = described.metadata, described.entry_points
        license_text = archive.read(f"{package}-{version}.dist-info/licenses/LICENSE").decode()
    assert "Apache License" in license_text, f"{path.name}: {license_text[:80]!r}"
    assert f"{package}/py.typed" in names, f"{path.name} lacks py.typed"
    told = metadata.get_all("Project-URL") or []
    urls = {url.split(", ")[0] for url in told}
    assert (urls == {"oLLM"}) if package == NO_HOME else (urls >= URLS), f"{path.name}: {urls}"
    points = {(point.group, point.name) for point in declared}
    assert points == POINTS[package], f"{path.name}: {points}"
    assert metadata["License-Expression"] == "Apache-2.0", path.name
    assert metadata["Description-Content-Type"] == "text/markdown", path.name
    allowed = {package, f"{package}-{version}.dist-info", *({"ollm.py"} & {*names})}
    top = {PurePosixPath(name).parts[0] for name in names}
    assert top == allowed, f"{path.name}: {top}"
    return package


def check_sdist(path: Path) -> None:
    """It stands alone: a license that is a file, and what it is built from."""
    with tarfile.open(path) as archive:
        members = {PurePosixPath(*PurePosixPath(m.name).parts[1:]): m for m in archive.getmembers()}
    for name in ("LICENSE", "README.md", "pyproject.toml"):
        member = members.get(PurePosixPath(name))
        assert member is not None, f"{path.name} lacks {name}"
        assert member.isfile(), f"{path.name}: {name} is no file"


def check_template(wheel: Path, checkout: Path) -> None:
    """Every file of the template is in the wheel, hidden ones included."""
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if name.startswith(f"{TEMPLATE}/")}
    source = checkout / "conformance/src"
    files = (path for path in (source / TEMPLATE).rglob("*") if path.is_file())
    expected = {path.relative_to(source).as_posix() for path in files}
    assert found == expected, f"template: {sorted(found ^ expected)}"


def check_installed(packages: Iterable[str], checkout: Path) -> None:
    """What Python imports are the wheels' files, none of the checkout's."""
    for package in (*packages, "ollm"):
        module = importlib.import_module(package)
        assert module.__file__ is not None, package
        place = Path(module.__file__).resolve()
        assert place.is_relative_to(Path(sys.prefix).resolve()), f"{package} is at {place}"
    for package in packages:
        origin = distribution(package.replace("_", "-")).read_text("direct_url.json") or ""
        assert "dir_info" not in origin, f"{package} was installed from a directory: {origin}"
    for module in list(sys.modules.values()):
        place = getattr(module, "__file__", None)
        if place and module.__name__ != "__main__":
            assert not Path(place).resolve().is_relative_to(checkout), f"{module} is the checkout's"


def main(dist: Path, checkout: Path) -> None:
    wheels = sorted(dist.glob("*.whl"))
    packages = [check_wheel(path) for path in wheels]
    assert set(packages) == POINTS.keys(), packages
    sdists = sorted(dist.glob("*.tar.gz"))
    assert len(sdists) == len(wheels)
    for path in sdists:
        check_sdist(path)
    (wheel,) = dist.glob("ollm_conformance-*.whl")
    check_template(wheel, checkout)
    check_installed(packages, checkout.resolve())
    sys.stdout.write(f"{len(wheels)} wheels and {len(sdists)} source distributions are whole\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
