# One short command per habit. Needs Python 3.11 or newer and a package registry; everything goes into .venv.
PYTHON ?= python3
BIN := .venv/bin

# Exact versions for what is installed, and for what builds it.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_BUILD_CONSTRAINT := $(PIP_CONSTRAINT)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export RAY_USAGE_STATS_ENABLED := 0
# Else each of a thousand test processes compiles psgd anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test lint types imports unit integration chaos bench clean
.NOTPARALLEL:

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: .venv/data.stamp ## train on the digits that come with scikit-learn, with 2 workers: two minutes at first
	$(BIN)/psgd train deploy/jobs/digits.yaml --name digits-$$(date +%Y%m%d-%H%M%S)

test: lint types imports unit integration ## all that a change must pass; CI runs this

lint: .venv/dev.stamp ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/dev.stamp ## mypy, strict
	$(BIN)/mypy

imports: .venv/dev.stamp ## imports run one way
	$(BIN)/lint-imports

unit: .venv/dev.stamp ## fast tests, one file per module; those of the benchmarks, too
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 tests/unit tests/simulation tests/benchmarks

integration: .venv/dev.stamp ## tests on a real, local Ray cluster; as root, on several hosts in network namespaces, too
	$(BIN)/pytest --numprocesses 2 --dist loadfile -m 'not chaos' tests/integration tests/hosts

chaos: .venv/dev.stamp ## 20,000 simulated runs with random faults; processes and hosts killed or cut off on real Ray; about 40 minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.simulation
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --hypothesis-profile anew tests/unit/core
	$(BIN)/pytest -m chaos tests/integration tests/hosts

bench: .venv/dev.stamp ## speed, beside plain NumPy and torch; the published experiments; into bench/; about an hour
	$(BIN)/python -m tests.benchmarks.throughput
	$(BIN)/python -m tests.benchmarks.throughput --seconds 20 --only psgd_job own_loops psgd_unvalidated_job --out bench/steady.json
	$(BIN)/python -m tests.benchmarks.transfer
	$(BIN)/python -m tests.benchmarks.small
	$(BIN)/python -m tests.benchmarks.apply
	$(BIN)/python -m tests.benchmarks.stragglers
	$(BIN)/python -m tests.benchmarks.servers
	$(BIN)/python -m tests.benchmarks.startup
	$(BIN)/python -m tests.benchmarks.recovery
	$(BIN)/python -m tests.benchmarks.soak
	$(BIN)/python -m tests.benchmarks.lanes_page
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.benchmarks.million
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.benchmarks.experiments
	$(BIN)/python -m tests.benchmarks.order

clean: ## remove .venv and all caches; runs/ and bench/ stay
	rm -rf .venv .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# .venv/EXTRA.stamp: psgd is installed with that extra, as pyproject.toml and constraints.txt now say.
.venv/%.stamp: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/pip install -qq --editable '.[$*]'
	@touch $@

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
		"psgd needs Python 3.11 or newer, but $(PYTHON) is " + sys.version.split()[0] + "; try: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
