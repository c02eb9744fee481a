# make demo   install and run the main job on the embedded model, offline
# make test   install and run the tests
# make test COVERAGE=1   the same, with how much of each file they ran; half as long again
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WORKERS ?= 2

.PHONY: demo test test-slow test-real test-newest test-floor real-models models schema counts lint types wheel clean

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[eval,dev]'
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/hfpatch demo --out out/demo

test: $(STAMP)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS) $(if $(COVERAGE),--cov --cov-report=term)

test-slow: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m slow

# What is marked real, on the small models in $(REAL), which real-models fetches from the Hub
REAL ?= real-models

test-real: $(STAMP)
	HFPATCH_REAL_MODELS=$(abspath $(REAL)) HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m real -rs

real-models: $(STAMP)
	$(BIN)/python tests/fetch_models.py $(REAL)

# Other releases of Transformers, each in an environment of its own: the newest there is, the oldest hfpatch runs on.
# A part of the tests that takes a few minutes: what meets Transformers, with the invariants on every third model.
PART := tests/test_invariants.py tests/test_cache_state.py tests/test_generation.py tests/test_injection.py \
	tests/test_layer_choice.py tests/test_patched_in_use.py tests/test_zoo.py tests/test_keywords.py \
	tests/runtime tests/methods/test_flux_cropped.py tests/test_eviction.py
NEWEST ?= transformers>=5.24,<6
FLOOR ?= transformers==5.2.0

test-newest:
	$(call test-release,.venv-newest,--upgrade '$(NEWEST)')

test-floor:
	$(call test-release,.venv-floor,'$(FLOOR)')

define test-release
	test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt torch pytest hypothesis
	$(1)/bin/python -m pip install -q --disable-pip-version-check $(2) pytest-xdist pyyaml jsonschema
	$(1)/bin/python -m pip install -q --disable-pip-version-check --no-deps -e .
	$(1)/bin/python -c "import transformers; print('Transformers', transformers.__version__)"
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(1)/bin/python -m pytest -n $(WORKERS) --third $(PART)
endef

# docs/models.md: every model type of the installed Transformers, patched and compared
models: $(STAMP)
	cd tests && OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(abspath $(BIN))/python -m survey --all --workers $(WORKERS) --write ../docs/models.md

# recipes/schema.json anew, from the settings of every kind of job
schema: $(STAMP)
	$(BIN)/python -c "from hfpatch.evals.recipe.schema import write; write()"

# tests/pretend/counts.md anew: operations and waits for the GPU of every method, counted without one
counts: $(STAMP)
	cd tests && OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(abspath $(BIN))/python -m pretend --write

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check hfpatch evals recipes tests

types: $(STAMP)
	$(BIN)/mypy

wheel: $(STAMP)
	rm -rf dist && $(BIN)/python -m build -q --wheel

clean:
	rm -rf build dist out *.egg-info
