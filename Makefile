# Everything from a git clone: `make quickstart`, `make test`, `make benchmark`. Each builds .venv where it is missing.

USABLE := import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 13))
PYTHON ?= $(shell for p in python3.11 python3.12 python3.10 python3 python; do \
	$$p -c '$(USABLE)' 2>/dev/null && command -v $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

export HF_HUB_OFFLINE ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK ?= 1

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-fast test-image-versions lint benchmark clean

# What runs here is made for CPU processes; a GPU is neither needed nor taken.
quickstart test test-fast test-image-versions benchmark: export CUDA_VISIBLE_DEVICES :=

help:
	@echo "make quickstart   the whole pipeline on real text, two CPU processes; about 10 minutes with installation"
	@echo "make test         every test but those for GPUs, in two processes; make test-fast: the short ones"
	@echo "make test-image-versions   core/ and model/ on the Megatron-Core of NVIDIA's image; about 8 minutes"
	@echo "make benchmark    loss and training step beside NeMo's, ModelOpt's and torch's; about 12 minutes"
	@echo "make install      builds $(VENV) alone, which the others do where it is missing"
	@echo "make lint         ruff and mypy;  make clean: removes what building and tests leave"
	@echo "README.md says how to run it on your own model."

install: $(STAMP)

# One installation at a time; one that was interrupted is started afresh, since pip may not be able to repair it.
$(STAMP): setup.py containers/constraints.txt
	@test -n "$(PYTHON)" || { echo "expected Python 3.10 to 3.12 with venv on PATH, found none. Set PYTHON=/path/to/python."; exit 2; }
	@set -e; exec 9>$(VENV).lock; flock 9 2>/dev/null || true; \
	if [ $@ -nt setup.py ] && [ $@ -nt containers/constraints.txt ]; then exit 0; fi; \
	if [ -e $(VENV)/.installing ]; then echo "removing $(VENV), whose installation was interrupted"; rm -rf $(VENV); fi; \
	echo "installing into $(VENV) with $(PYTHON); this takes some minutes"; \
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV); \
	touch $(VENV)/.installing; \
	$(BIN)/python -m pip install --quiet --constraint containers/constraints.txt --editable '.[test]'; \
	mv $(VENV)/.installing $@

quickstart: $(STAMP)
	$(BIN)/python -m pipelines stage=all experiment=quickstart

# Whole files go to this many processes, the longest first (tests/conftest.py). PYTEST_ARGUMENTS: what else pytest is told.
TEST_PROCESSES ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

test: $(STAMP)
	$(PYTEST) -m "not gpu" $(PYTEST_ARGUMENTS)

test-fast: $(STAMP)
	$(PYTEST) -m "not gpu and not slow" $(PYTEST_ARGUMENTS)

# NVIDIA's image of the Dockerfile has this Megatron-Core; it lies in front of the one that is installed.
IMAGE_VERSIONS := $(VENV)-image-versions
$(IMAGE_VERSIONS)/.installed: Makefile | $(STAMP)
	rm -rf $(IMAGE_VERSIONS)
	$(BIN)/python -m pip install --quiet --no-deps --target $(IMAGE_VERSIONS) megatron-core==0.15.0
	touch $@

test-image-versions: $(IMAGE_VERSIONS)/.installed
	OMP_NUM_THREADS=1 PYTHONPATH=$(abspath $(IMAGE_VERSIONS)) STILLHOUSE_MEGATRON=0.15.0 \
		$(BIN)/python -m pytest -m "not gpu" tests/core tests/model

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

benchmark: $(STAMP)
	$(BIN)/python -m pipelines stage=benchmark parallel=tp1 benchmark.docs=docs/benchmark experiment=benchmark
	$(BIN)/python -m pipelines stage=benchmark parallel=tp2 benchmark.docs=docs/benchmark experiment=benchmark

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
