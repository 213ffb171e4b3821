# Every target makes .venv first, where it needs it (.ci/bootstrap).

PYTHON_BIN := .venv/bin/python
# Versions of megatron-core that the tests also run against.
MATRIX ?= 0.18.2 0.16.1
# More arguments for pytest: make test PYTEST_ARGS="-k plan -x"
PYTEST_ARGS ?=

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help bootstrap demo lint format test test-matrix test-gpu clean

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

bootstrap: ## make .venv, or bring it up to date
	@.ci/bootstrap

demo: bootstrap ## resume a small run with other hyperparameters and plot what happens
	$(PYTHON_BIN) -m megatron_ext.demo

lint: bootstrap ## ruff and mypy
	$(PYTHON_BIN) -m ruff check .
	$(PYTHON_BIN) -m ruff format --check .
	$(PYTHON_BIN) -m mypy

format: bootstrap ## let ruff format the code and mend what it can
	$(PYTHON_BIN) -m ruff format .
	$(PYTHON_BIN) -m ruff check --fix .

test: lint ## lint, then all tests
	$(PYTHON_BIN) -m pytest $(PYTEST_ARGS)

test-matrix: bootstrap ## the tests that meet Megatron, against each megatron-core of MATRIX
	@failed=; for version in $(MATRIX); do \
	    echo "== megatron-core $$version"; \
	    overlay=$$(.ci/overlay $$version) \
	        && PYTHONPATH=$$overlay $(PYTHON_BIN) -m pytest tests -m "ranks or matrix" $(PYTEST_ARGS) \
	        || failed="$$failed $$version"; \
	done; \
	if [ -n "$$failed" ]; then echo "test-matrix: failed with megatron-core$$failed" >&2; exit 1; fi

test-gpu: bootstrap ## the tests that need a CUDA device
	$(PYTHON_BIN) -m pytest -m gpu $(PYTEST_ARGS)

clean: ## remove what builds, tests and the demo leave behind; .venv stays
	rm -rf build dist demo-output *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./.venv -prune -o -type d -name __pycache__ -exec rm -rf {} +
