# Two commands do everything on a fresh machine with Python 3.11+:
#   make demo    set up, run the main job on the embedded workload, say where the results are
#   make test    set up with test extras, then lint, types and tests
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= runs/quickstart
PYTEST_ARGS ?=

export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: demo test lint types unit setup setup-test proto clean

demo: setup
	@if [ -e "$(OUT)/ledger.db" ]; then rm -rf "$(OUT)"; fi
	$(BIN)/fedpeft simulate simulations/jobs/quickstart.toml --out $(OUT)

test: setup-test lint types unit

lint: setup-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup-test
	$(BIN)/mypy

unit: setup-test
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# Regenerate proto/fedpeft_proto from proto/fedpeft/v1 (needs the dev extra).
proto: setup-test
	$(BIN)/python proto/generate.py

setup: $(VENV)/.installed
setup-test: $(VENV)/.installed-test

# torch is installed by its exact version first: by a range, pip would take the newest build with all of CUDA.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fedpeft needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) dist build
