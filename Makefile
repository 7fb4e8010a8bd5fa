# `make demo` and `make test` need nothing but Python 3.11 to 3.13 with its venv module; they set up what they use.
BIN := $(or $(UNIRL_VENV),.venv)/bin
PURE_ROOMS := algorithms pairing types config config_rules config_keys config_loading

# Files of tests run side by side; each process has one thread.
TEST_PROCESSES ?= 2

export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help demo test lint docs bench setup setup-dev

help:
	@echo "make demo   set up, then train on the embedded lab on this machine's CPU and write a report"
	@echo "make test   set up, then everything that must hold: style, types, tests, coverage, docs"
	@echo "make lint   style and types"
	@echo "make bench  speed of a step's parts against plain baselines, saved for the docs (ten minutes)"
	@echo "make docs   the documentation as HTML in docs/_build/html"

setup:
	@launch/setup.sh

setup-dev:
	@launch/setup.sh --dev

demo: setup
	$(BIN)/unirl train -c configs/rl/lab.yaml $(ARGS)

test: lint
	$(BIN)/python -m pytest -q -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder --durations=40 --jaxtyping-packages=unirl.algorithms,unirl.pairing,beartype.beartype \
		$(PURE_ROOMS:%=--cov=unirl.%) --cov-report=term --cov-fail-under=95
	$(BIN)/sphinx-build -q -W --keep-going -b html docs docs/_build/html

lint: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

bench: setup-dev
	$(BIN)/unirl bench all

docs: setup-dev
	$(BIN)/sphinx-build -q -W --keep-going -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"
