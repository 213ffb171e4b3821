# Every target makes .venv first, where it needs it (.ci/bootstrap).

PYTHON_BIN := .venv/bin/python
# Versions of megatron-core that the tests also run against.
MATRIX ?= 0.18.2 0.17.1 0.16.1
# The oldest Transformer Engine that can be imported with .venv's torch; 1.13.0 cannot, and Megatron's
# precision-aware optimizer needs no newer one.
OLDEST_TE ?= 2.1.0
SOURCES := $(wildcard csrc/*.* csrc/*/*.*)
# More arguments for pytest: make test PYTEST_ARGS="-k plan -x"
PYTEST_ARGS ?=
# A file at a time: what a module's tests share is made once.
PYTEST := $(PYTHON_BIN) -m pytest -n 2 --dist loadfile
# Ranks and test processes share the cores: threads of torch would wait for each other.
test%: export OMP_NUM_THREADS := 1
# Every process imports torch, Megatron and this package.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help bootstrap demo docs schemas reference lint format test test-all test-quick test-matrix test-bridge \
    test-te test-torch test-gpu soak faults contract pytest bench clean

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

bootstrap: ## make .venv, or bring it up to date
	@.ci/bootstrap

demo: bootstrap ## resume a small run with other hyperparameters and plot what happens
	$(PYTHON_BIN) -m megatron_ext.demo --older "$$(.ci/overlay 0.18.2)"

lint: bootstrap ## ruff, mypy and clang-format
	$(PYTHON_BIN) -m ruff check .
	$(PYTHON_BIN) -m ruff format --check .
	$(PYTHON_BIN) -m mypy
	.venv/bin/clang-format --dry-run -Werror $(SOURCES)

format: bootstrap ## let ruff and clang-format format the code and mend what they can
	$(PYTHON_BIN) -m ruff format .
	$(PYTHON_BIN) -m ruff check --fix .
	.venv/bin/clang-format -i $(SOURCES)

test: lint pytest ## lint, then the tests, two files at a time

pytest: bootstrap
	$(PYTEST) --durations 20 $(PYTEST_ARGS)

test-all: override PYTEST_ARGS += --all
test-all: test ## the same with all cells of the matrices

test-quick: bootstrap ## the tests of one process
	$(PYTEST) -m "not ranks and not e2e" $(PYTEST_ARGS)

# With -j all versions at the same time, which takes as many cores as versions.
test-matrix: $(MATRIX:%=test-with-%) ## the tests that meet Megatron, against each megatron-core of MATRIX

test-with-%: bootstrap
	@echo "== megatron-core $*"
	@overlay=$$(.ci/overlay $*) && PYTHONPATH=$$overlay $(PYTHON_BIN) -m pytest -m matrix $(PYTEST_ARGS)

# Over .venv's own megatron-core, whatever MATRIX says.
test-bridge: bootstrap ## the tests that train with Megatron-Bridge
	@overlay=$$(.ci/overlay bridge) && PYTHONPATH=$$overlay \
	    $(PYTHON_BIN) -m pytest tests/bridge --require-bridge $(PYTEST_ARGS)

test-te: bootstrap ## the tests with the optimizer classes of Transformer Engine
	@overlay=$$(.ci/overlay te) && PYTHONPATH=$$overlay \
	    $(PYTEST) tests/te --require-te $(PYTEST_ARGS)
	@overlay=$$(.ci/overlay te-$(OLDEST_TE)) && megatron=$$(.ci/overlay $(lastword $(MATRIX))) && \
	    PYTHONPATH=$$megatron:$$overlay \
	    $(PYTEST) tests/te/test_cells.py --require-te $(PYTEST_ARGS)

test-torch: bootstrap ## build the kernels against the oldest torch that they support
	@overlay=$$(.ci/overlay torch) && MEGATRON_EXT_OLD_TORCH=$$overlay \
	    $(PYTHON_BIN) -m pytest tests/_ops/test_old_torch.py $(PYTEST_ARGS)

SECONDS ?= 600
PHASES ?= 100
soak: export OMP_NUM_THREADS := 1
soak: bootstrap ## damaged input for SECONDS=600, and a chain of PHASES=100 phases on two ranks
	$(PYTHON_BIN) -m benchmarks.soak --seconds $(SECONDS) --phases $(PHASES)

contract: bootstrap ## try a checkout of Megatron-LM: make contract MEGATRON_PATH=/path/to/it
	$(PYTHON_BIN) -m tests.support.contract_check $(MEGATRON_PATH)

faults: export OMP_NUM_THREADS := 1
faults: bootstrap ## try every fault and write docs/reference/faults.md (30 minutes)
	$(PYTHON_BIN) -m tests.support.fault_table

test-gpu: bootstrap ## the tests that need a CUDA device
	$(PYTHON_BIN) -m pytest -m gpu $(PYTEST_ARGS)

bench: bootstrap ## what a resume costs: stock and ours in turn (9 minutes)
	$(PYTHON_BIN) -m benchmarks.resume
	$(PYTHON_BIN) -m benchmarks.resume.page

docs: bootstrap ## build the documentation into docs/_build; warnings are errors
	$(PYTHON_BIN) -m sphinx -W --keep-going -n -q docs docs/_build
	@echo docs/_build/index.html

schemas: bootstrap ## write megatron_ext/schemas anew, from the types of the documents
	$(PYTHON_BIN) -m megatron_ext.schemas

reference: bootstrap ## write the generated parts of docs/ anew, from the code
	$(PYTHON_BIN) -m tests.support.reference

clean: ## remove what builds, tests and the demo leave behind; .venv stays
	rm -rf build dist docs/_build demo-output *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./.venv -prune -o -type d -name __pycache__ -exec rm -rf {} +
