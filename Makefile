# One verb each; `make help` lists them.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
PACKAGING ?= environment
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
BENCHMARKS := rounds aggregation precision tracking data inference footprint first_round images \
	scale_learners scale_nodes scale_projects

.PHONY: help install lock format lint types contracts check test test-fast chaos flavors bench peers demo demo-stop clean

help: ## list the verbs
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

install: $(STAMP) ## create .venv and install FLOps with its locked dependencies

$(STAMP): requirements/uv.txt requirements/lock.txt pyproject.toml
	@scripts/install $(PYTHON) $(VENV)
	@touch $(STAMP)

lock: ## resolve the dependencies anew into requirements/
	scripts/lock $(BIN)

format: install ## format the code
	$(BIN)/ruff format . && $(BIN)/ruff check --fix .

lint: install ## format check and lint
	$(BIN)/ruff format --check . && $(BIN)/ruff check .

types: install ## type check
	$(BIN)/mypy

contracts: install ## import contracts
	$(BIN)/lint-imports

check: lint types contracts ## everything that runs no code

test: install ## all checks and all tests
	scripts/test $(BIN)

test-fast: install ## unit, contract and property tests only
	$(BIN)/pytest tests/unit tests/contract tests/property tests/architecture

chaos: install ## the long tests of faults: kills at every stage, a soak of 200 projects
	$(BIN)/pytest -m chaos -s

flavors: install ## train and serve a model of each big library: PyTorch, TensorFlow, XGBoost
	$(BIN)/pytest -m flavors -s

bench: install ## all benchmarks; make bench-rounds and so on for one of benchmarks/
	for name in $(BENCHMARKS); do $(BIN)/python benchmarks/$$name.py || exit 1; done

bench-%: install
	$(BIN)/python benchmarks/$*.py $(ARGS)

peers: ## install what `make bench-rounds` compares with, into an environment of its own
	$(PYTHON) -m venv .venv-peers && .venv-peers/bin/pip install -q -r benchmarks/peers.txt

demo: install ## run the main job on real data; PACKAGING=image runs it in containers
	$(BIN)/python scripts/demo.py --packaging $(PACKAGING)

demo-stop: install ## stop what the demo left running; its state stays in .demo
	$(BIN)/python scripts/demo.py --packaging $(PACKAGING) --stop

clean: ## remove the virtual environment and caches
	rm -rf $(VENV) .venv-peers .mypy_cache .ruff_cache .pytest_cache .hypothesis .demo .demo-image
