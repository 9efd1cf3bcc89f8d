# Two commands on a fresh machine: `make demo` and `make test`. Each sets up .venv first, once.
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
TORCH := $(shell grep '^torch==' constraints.txt)

.PHONY: demo test quick check clean
.DEFAULT_GOAL := test

# torch goes first and by its exact version, so that no other package's requirement chooses its build.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Patcher needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet "$(TORCH)"
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY)
	@test ! -e demo-out || mv demo-out demo-out-$$(date +%Y%m%d-%H%M%S)
	$(VENV)/bin/patcher demo

check: $(READY)
	$(VENV)/bin/ruff check src tests
	$(VENV)/bin/mypy

test: check
	$(VENV)/bin/python -m pytest -q

# While you write: everything but what trains the real model.
quick: check
	$(VENV)/bin/python -m pytest -q -m "not slow"

clean:
	rm -rf $(VENV) demo-out* build dist .mypy_cache .ruff_cache .pytest_cache src/*.egg-info
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
