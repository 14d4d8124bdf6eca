# make demo | test | lint | check. Each sets up .venv first when it is missing or out of date.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
NEEDS_PYTHON := import sys; sys.exit(sys.version_info < (3, 11))

.PHONY: help install demo test lint check parity clean

help:
	@echo 'make install   make .venv with pinned packages (idempotent)'
	@echo 'make demo      train, reshard, finetune and export a small model on this machine'
	@echo 'make test      run the tests'
	@echo 'make lint      format, lint, types and import contracts'
	@echo 'make check     lint and test'
	@echo 'make parity    train every pair of features against one process; write docs/parity.md, docs/capabilities.md'

install: $(INSTALLED)

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo 'make: there is no $(PYTHON); install Python 3.11 or newer, or name one: make install PYTHON=/path/to/python3' >&2; exit 1; }
	@$(PYTHON) -c '$(NEEDS_PYTHON)' || { echo "make: Python 3.11 or newer is needed, but $(PYTHON) is $$($(PYTHON) -V); name another: make install PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv .venv >/dev/null || { rm -rf .venv; echo 'make: $(PYTHON) -m venv failed; on Debian and Ubuntu, apt-get install python3-venv' >&2; exit 1; }

$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/python
	@$(BIN)/python -c '$(NEEDS_PYTHON)' || { echo "make: .venv holds $$($(BIN)/python -V), but Python 3.11 or newer is needed; remove .venv and run make again" >&2; exit 1; }
	@[ -e $@ ] || echo 'Installing into .venv (some minutes on a fresh machine) ...'
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]' || { echo 'make: pip could not install the packages of constraints.txt, for the reason above; is there a network?' >&2; exit 1; }
	@touch $@

demo: install
	@$(BIN)/wb demo

test: install
	@$(BIN)/python -m pytest -q

parity: install
	@$(BIN)/python -m tests.parity.capabilities
	@$(BIN)/python -m tests.parity.matrix
	@$(BIN)/python -m tests.converters.matrix
	@$(BIN)/python -m pytest -q -m exhaustive

lint: install
	@$(BIN)/ruff format --check --quiet . || { echo 'make: the files above are not formatted; run .venv/bin/ruff format .' >&2; exit 1; }
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy --no-error-summary
	@$(BIN)/lint-imports --no-cache > .venv/lint-imports.log || { cat .venv/lint-imports.log >&2; exit 1; }
	@echo 'lint: format, rules, types and import contracts hold'

check: lint test

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
