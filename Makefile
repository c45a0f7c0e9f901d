# One short command for each task. Needs Python 3.11 or newer and a package registry; everything is installed into .venv.
PYTHON ?= python3
BIN := .venv/bin

# Exact versions of the installed packages and of the packages that build them.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_BUILD_CONSTRAINT := $(PIP_CONSTRAINT)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export RAY_USAGE_STATS_ENABLED := 0
# If it were set, each of a thousand test processes would compile psgd again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test lint types imports unit integration chaos bench clean

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: .venv/data.stamp ## train on scikit-learn's digits with 2 workers; the first time takes two minutes
	$(BIN)/psgd train deploy/jobs/digits.yaml --name digits-$$(date +%Y%m%d-%H%M%S)

test: lint imports unit ## run all checks that a change must pass, as CI does
	$(MAKE) --jobs 2 types integration

lint: .venv/dev.stamp ## check rules and format with ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/dev.stamp ## check types with mypy, strict
	$(BIN)/mypy

imports: .venv/dev.stamp ## check that imports run one way
	$(BIN)/lint-imports

unit: .venv/dev.stamp ## run the fast tests: unit tests, fault injection, arithmetic of the benchmarks
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 -m 'not chaos' tests/unit tests/simulation tests/benchmarks

integration: .venv/dev.stamp ## run the tests on a real, local Ray; as root on Linux, also on three hosts in network namespaces
	$(BIN)/pytest --numprocesses 2 --dist loadfile -m 'not chaos' tests/integration tests/hosts

chaos: .venv/dev.stamp ## run 20,000 simulated runs with faults, read damaged files and frames, kill processes and hosts on real Ray; an hour
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.simulation
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --hypothesis-profile anew tests/unit/core
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 -m chaos tests/unit
	$(BIN)/pytest -m chaos tests/integration tests/hosts

bench: .venv/dev.stamp ## measure speed beside its peers, run the published experiments; results in bench/; more than an hour
	$(BIN)/python -m tests.benchmarks.throughput
	$(BIN)/python -m tests.benchmarks.throughput --seconds 20 --only psgd_job own_loops psgd_unvalidated_job psgd_bare --out bench/steady.json
	$(BIN)/python -m tests.benchmarks.batch_sizes
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

clean: ## remove .venv and all caches; keep runs/ and bench/
	rm -rf .venv .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# .venv/EXTRA.stamp exists if psgd is installed with that extra, as pyproject.toml and constraints.txt say now.
.venv/%.stamp: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/pip install -qq --editable '.[$*]'
	@touch $@

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
		"psgd needs Python 3.11 or newer, but $(PYTHON) is " + sys.version.split()[0] + "; try: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
