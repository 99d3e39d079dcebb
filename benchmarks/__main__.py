"""Runs one of the scripts, from anywhere.

usage: python benchmarks [SCRIPT] [ARGUMENT ...]

SCRIPT is the name of a file in one of the folders, or its path there, without .py: `decode`,
`decode/decode`. Without one, all are listed.
"""

from __future__ import annotations

import ast
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def _package() -> Path:
    """Make `benchmarks` importable, and nothing else that lies beside it: a peer's environment has
    an `ollm` of its own.
    """
    sys.path[0] = str(ROOT)
    import benchmarks

    del sys.path[0]
    return Path(benchmarks.__file__).parent


def _listing(home: Path) -> str:
    """Each folder with its scripts and what they say of themselves."""
    lines = []
    for path in sorted(home.glob("*/*.py")):
        text = path.read_text()
        if '__name__ == "__main__"' in text:
            about = (ast.get_docstring(ast.parse(text)) or "").split("\n")[0]
            lines.append(f"{path.parent.name + '/' + path.stem:24} {about}")
    return "\n".join(lines)


def main() -> None:
    home = _package()
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(f"usage: python benchmarks SCRIPT [ARGUMENT ...]\n\n{_listing(home)}")
        return
    name = sys.argv.pop(1).removesuffix(".py")
    path = next((one for at in ("", "*/") for one in home.glob(f"{at}{name}.py")), None)
    if path is None or path.parent == home:
        raise SystemExit(f"error: no script {name}\nhint: `python benchmarks` lists them")
    module = ".".join(path.relative_to(home.parent).with_suffix("").parts)
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
