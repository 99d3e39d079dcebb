#!/usr/bin/env bash
# Does what a stranger does who has pip and no clone: wheels of every distribution, each built from its
# source distribution, in a fresh virtual environment that sees nothing of any other; in a directory
# of its own the command line, the suite for an installed adapter, an adapter made by `ollm adapter
# new`, built, installed and tested; then the first family of docs/adapter-tutorial.md,
# pip and the whole suite included.
# `make template` calls it.
#
#     tests/check_wheels.sh PYTHON
set -euo pipefail
python=$(realpath -s "$1")
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
work=$(mktemp -d)
end() { kill $(jobs -p) 2>/dev/null || true; wait; rm -rf "$work"; }
trap end EXIT
unset PYTHONPATH
export OMP_NUM_THREADS=1

"$python" -m venv "$work/venv"
bin=$work/venv/bin
# Without compiling it all: what is imported is compiled then, and that is a part of it.
install() { "$bin/python" -m pip install --quiet --no-compile -c "$root/constraints.txt" "$@"; }
build() { PYTHONPATH=$work/tools "$bin/python" -m build --no-isolation --outdir "$work/dist" "$1" >"$work/log" || { cat "$work/log"; exit 1; }; }

install --target "$work/tools" build hatchling
install torch & # beside the builds
torch=$!
for directory in "$root" "$root/conformance" "$root"/adapters/* "$root"/plugins/*; do build "$directory"; done
wait "$torch"
install "$work"/dist/*.whl pytest-xdist

mkdir "$work/elsewhere"
cd "$work/elsewhere"
"$bin/ollm" adapter new mistral --defaults
build ollm-adapter-mistral
install "$(echo "$work"/dist/ollm_adapter_mistral-*.whl)[dev]"
"$bin/python" -I "$root/tests/check_wheels.py" "$work/dist" "$root"
"$bin/ollm" list-models
"$bin/ollm" list-models --json >models.json
grep -q '"id": "smollm2-135M"[^}]*"distribution": "ollm-adapter-llama"' models.json

# The tutorial goes on beside the rest, in an environment that has all that this one has: what it
# installs is then not seen here.
"$python" -m venv --without-pip "$work/reader"
site() { "$1" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }
site "$bin/python" >"$(site "$work/reader/bin/python")/all.pth"
(
    cd "$work"
    export PIP_CONSTRAINT=$root/constraints.txt OLLM_TUTORIAL_PIP=1 OLLM_TUTORIAL_WHOLE=olmo2
    exec "$work/reader/bin/python" -m pytest -o filterwarnings= "$root/tests/docs/test_tutorial.py" \
        -k "not Granite and not Gemma"
) >"$work/tutorial" 2>&1 &
tutorial=$!

"$bin/pytest" --pyargs ollm_conformance.suite --ollm-adapter llama \
    --ollm-checks declaration.names,weights.every-tensor-once,exact.decode

cd ollm-adapter-mistral
"$bin/mypy" src
export OLLM_LOAD_PLUGINS=ollm-adapter-mistral
# The whole suite runs for the family of the tutorial, and for Mistral in the tests of the generic adapter.
"$bin/pytest" --ollm-checks declaration.names,declaration.catalog,declaration.imports-clean,weights.every-tensor-once,exact.decode,caches.reopen
"$bin/ollm" list-models --json >models.json
grep -q '"id": "mistral-7b-instruct-v0.3"[^}]*"distribution": "ollm-adapter-mistral"' models.json

wait "$tutorial" || { cat "$work/tutorial"; exit 1; }
tail -n 1 "$work/tutorial"
