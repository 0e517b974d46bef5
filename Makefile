# Every target sets itself up: a virtual environment in the checkout, with CPU torch where there is
# no NVIDIA GPU. PYTHON, NUM_WORKERS and TORCH_INDEX_ARGS may be given on the command line.

PYTHON ?= python3
NUM_WORKERS ?= 2
BIN := .venv/bin
INSTALLED := .venv/.installed

# The CPU build of torch is a tenth of the download; where its index cannot be reached, the default
# index serves as well.
ifeq ($(shell command -v nvidia-smi),)
TORCH_INDEX_ARGS ?= --index-url https://download.pytorch.org/whl/cpu --timeout 5 --retries 1
endif
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt

.PHONY: demo test test-all lint clean

demo: $(INSTALLED)
	$(BIN)/python examples/demo.py

test: $(INSTALLED)
	$(BIN)/python -m pytest -n $(NUM_WORKERS) -m "not slow and not gpu"

test-all: $(INSTALLED)
	$(BIN)/python -m pytest -n $(NUM_WORKERS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv build dist demo-output .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) -qq $(TORCH_INDEX_ARGS) torch || $(INSTALL) torch
	$(INSTALL) -e '.[dev]'
	touch $@
