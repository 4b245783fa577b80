# Each target sets up its own virtual environment on a fresh machine; nothing outside this folder is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test slow lint bench readme clean

demo: $(VENV)/demo
	$(BIN)/python -m fuse_pass demo

test: $(VENV)/test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --quiet

slow: $(VENV)/test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --quiet -m slow

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/demo
	$(BIN)/python -m fuse_pass bench

# README.md shows the committed run: after `python -m fuse_pass bench all --json benchmarks.json`.
readme: $(VENV)/demo
	$(BIN)/python -m fuse_pass bench --from benchmarks.json --readme README.md

$(VENV)/python: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	touch $@

$(VENV)/demo: $(VENV)/python pyproject.toml
	$(PIP) --editable '.[hf]'
	touch $@

$(VENV)/test: $(VENV)/python pyproject.toml
	$(PIP) --editable '.[hf,test]'
	touch $@

$(VENV)/dev: $(VENV)/python pyproject.toml
	$(PIP) --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV)
