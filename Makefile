# Two commands set a fresh machine up: `make demo` and `make test`.

PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --constraint requirements.lock --editable

.PHONY: demo test check fmt lock

# capture -> rescore -> prune on the bundled model, in build/demo
demo: .venv/installed
	rm -rf build/demo && mkdir -p build/demo
	cd build/demo && ../../$(BIN)/eaftflow capture
	cd build/demo && ../../$(BIN)/eaftflow rescore
	cd build/demo && ../../$(BIN)/eaftflow rescore --criterion eaft_reap_sum --w-conflict -20
	cd build/demo && ../../$(BIN)/eaftflow prune

test: .venv/installed-dev
	$(BIN)/python -m pytest

# what a change must pass: lint, format, SQL, types, tests
check: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/sqlfluff lint --disable-progress-bar sql
	$(BIN)/mypy
	$(MAKE) test

fmt: .venv/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/sqlfluff fix --disable-progress-bar --quiet sql

# exact versions of everything, from what the bounds in pyproject.toml allow today
lock:
	rm -rf build/lock && $(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install --quiet torch==2.13.0
	build/lock/bin/python -m pip install --quiet --editable '.[dev]'
	build/lock/bin/python -m pip freeze --exclude-editable | sed 's/+cpu$$//' > requirements.lock

.venv/installed: requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(INSTALL) .
	touch $@

.venv/installed-dev: .venv/installed
	$(INSTALL) '.[dev]'
	touch $@
