#!/usr/bin/env bash
# Makes an adapter from this template as a stranger would: a fresh directory, a fresh virtual
# environment that sees nothing of any other, core and the adapter installed as wheels, the
# adapter's own tests, its line in `ollm list-models`; then the tutorial of CONTRIBUTING.md, pip
# included. `make template` calls it.
#
#     adapters/template/check.sh PYTHON     a Python with copier in it
set -euo pipefail
python=$(realpath -s "$1")
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
project=$work/ollm-adapter-mistral

"$python" -m copier copy --defaults --quiet "$root/adapters/template" "$project"
"$python" -m venv "$work/venv"
bin=$work/venv/bin
cd "$root"
"$bin/python" -m pip install --quiet -c constraints.txt torch
"$bin/python" -m pip install --quiet -c constraints.txt . ./conformance "$project[dev]" copier pytest-xdist

cd "$project"
export OLLM_LOAD_PLUGINS=ollm-adapter-mistral
OMP_NUM_THREADS=1 "$bin/python" -m pytest -n "${JOBS:-2}" --dist worksteal
"$bin/ollm" list-models | tee models.txt
grep -q '^mistral-7b-instruct-v0.3 .*ollm-adapter-mistral' models.txt

cd "$work"
unset OLLM_LOAD_PLUGINS
OLLM_TUTORIAL_PIP=1 "$bin/python" -m pytest -o filterwarnings= "$root/tests/test_tutorial.py"
