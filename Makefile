# `make quickstart` and `make test` are the only set-up anyone needs: each makes its own environment on first use.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUTPUT ?= quickstart_output
# A file's tests stay on one process: its fixtures are made once. Long files come first (tests/conftest.py).
PARALLEL := --numprocesses auto --dist loadfile --no-loadscope-reorder
FAST := $(addprefix tests/,test_architecture.py encoders evaluation modeling objectives planning recipes utils views)
# One thread per process: two OpenMP pools on few cores wait for each other. The allocator settings keep large buffers
# from being returned to the system and faulted in again at every training step.
export OMP_NUM_THREADS ?= 1
export MALLOC_MMAP_THRESHOLD_ ?= 8589934592
export MALLOC_TRIM_THRESHOLD_ ?= 17179869184

.PHONY: help quickstart test test-fast style docs notebooks clean
help:
	@echo "make quickstart   pretrain twice on photographs, probe, draw; results in $(OUTPUT)/"
	@echo "make test         the whole test suite (ARGS='-k vicreg' to choose)"
	@echo "make test-fast    its quick part: no launches, no scripts"
	@echo "make style        ruff and mypy"
	@echo "make docs         the documentation, in docs/_build"
	@echo "make notebooks    run the notebooks, and store what they print and draw (NOTEBOOKS='notebooks/05*.py' to choose)"

$(BIN)/.ready-%: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[$*]"
	@touch $@

quickstart: $(BIN)/.ready-quickstart
	$(BIN)/python training/quickstart.py --output_dir $(OUTPUT)

test: $(BIN)/.ready-dev
	$(BIN)/python -m pytest $(PARALLEL) --durations 20 $(ARGS)

test-fast: $(BIN)/.ready-dev
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow" $(FAST) $(ARGS)

style: $(BIN)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf .typecheck build && $(BIN)/python -m pip install --quiet --no-deps --target .typecheck .
	$(BIN)/mypy

docs: $(BIN)/.ready-dev
	$(BIN)/python -m sphinx --builder dirhtml --fail-on-warning --keep-going --quiet docs docs/_build

# The scripts are what is edited; each notebook is written anew from its script, and keeps what its last run printed. Two
# run at a time.
NOTEBOOKS ?= notebooks/*.py
notebooks: export PATH := $(abspath $(BIN)):$(PATH)
notebooks: $(BIN)/.ready-dev
	$(BIN)/python -m jupytext --quiet --to ipynb $(NOTEBOOKS)
	printf '%s\n' $(NOTEBOOKS:.py=.ipynb) | xargs -n 1 -P 2 $(BIN)/jupyter execute --inplace --timeout=600

clean:
	rm -rf $(VENV) .typecheck build dist docs/_build *.egg-info
