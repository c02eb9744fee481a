# make demo   install and run the main job on the embedded model, offline
# make test   install and run the tests
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WORKERS ?= 2

.PHONY: demo test test-slow test-floor models lint types wheel clean

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[eval,dev]'
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/hfpatch demo --out out/demo

test: $(STAMP)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS)

test-slow: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m slow

# The oldest Transformers hfpatch promises to run on, in an environment of its own.
test-floor:
	test -x .venv-floor/bin/python || $(PYTHON) -m venv .venv-floor
	.venv-floor/bin/python -m pip install -q --disable-pip-version-check 'torch==2.13.0' 'transformers==5.2.0' pytest pytest-xdist pyyaml jsonschema matplotlib
	.venv-floor/bin/python -m pip install -q --disable-pip-version-check --no-deps -e .
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 .venv-floor/bin/python -m pytest -n $(WORKERS)

# docs/models.md: every model type of the installed Transformers, patched and compared
models: $(STAMP)
	cd tests && OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(abspath $(BIN))/python -m survey --all --workers $(WORKERS) --write ../docs/models.md

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check hfpatch evals recipes tests

types: $(STAMP)
	$(BIN)/mypy

wheel: $(STAMP)
	rm -rf dist && $(BIN)/python -m build -q --wheel

clean:
	rm -rf build dist out *.egg-info
