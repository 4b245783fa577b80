# Each target sets up its own virtual environment on a fresh machine.
#   PYTHON=python3.13  with that Python, in an environment beside the default one
#   TORCH=2.15.0       with that version of torch, in a large environment outside this folder, which checkouts share
PYTHON ?= python3
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
ifdef TORCH
VENV := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/fuse_pass/torch-$(TORCH)-py$(VERSION)
CONSTRAINTS := $(VENV)/constraints.txt
# Only what the package needs stays installed there; the package itself is that of this folder.
DETACH = && $(BIN)/python -m pip uninstall --quiet --yes fuse_pass
else
VENV := .venv$(if $(filter-out python3,$(PYTHON)),-py$(VERSION))
CONSTRAINTS := constraints.txt
endif
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS)
# This folder's package, whatever else is installed.
RUN := PYTHONPATH='$(CURDIR)' $(BIN)/python -m

# A processor that offers less than this one: no AVX-512, no products in half types, in C++ too (torch 2.13). What it
# compiles stays apart.
OTHER_CPU := ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 TORCHINDUCTOR_CPP_MARCH=haswell \
    TORCHINDUCTOR_CACHE_DIR=$(CURDIR)/$(VENV)/other-cpu-cache

.PHONY: demo test test-other-cpu test-integrations slow forms environment lint bench figures docs clean

demo: $(VENV)/demo
	$(RUN) fuse_pass demo

test: $(VENV)/test
	OMP_NUM_THREADS=1 $(RUN) pytest --numprocesses auto --quiet
	$(MAKE) test-other-cpu

# The tests that depend on what the processor offers, once more on the other kind.
test-other-cpu: $(VENV)/test
	$(OTHER_CPU) OMP_NUM_THREADS=1 $(RUN) pytest --numprocesses auto --quiet -m 'processor and not slow'

# Other people's tools, which this installs; writes docs/works-with.md.
test-integrations: $(VENV)/integrations
	OMP_NUM_THREADS=1 $(RUN) pytest --numprocesses auto --quiet -m 'not slow' tests/integrations --write-works-with

slow: $(VENV)/test
	OMP_NUM_THREADS=1 $(RUN) pytest --numprocesses auto --quiet -m slow

# A minute: whether the graphs that PyTorch hands us are still what we take them for.
forms: $(VENV)/test
	OMP_NUM_THREADS=1 $(RUN) pytest --quiet tests/forms

environment: $(VENV)/test

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/demo
	$(RUN) fuse_pass bench

# docs/benchmarks.md shows the committed runs, one per processor (and what else was different), oldest first:
# after `python -m fuse_pass bench all --json benchmarks/<processor>.json`.
RUNS := benchmarks/amd-epyc-avx512.json benchmarks/intel-xeon-amx.json
figures: $(VENV)/demo
	$(RUN) fuse_pass bench --from $(RUNS) --readme docs/benchmarks.md

docs: $(VENV)/docs
	PYTHONPATH='$(CURDIR)' $(BIN)/mkdocs build --strict --site-dir build/docs

$(VENV)/constraints.txt:
	mkdir -p $(VENV)
	echo 'torch==$(TORCH)' > $@

$(VENV)/python: $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	@$(PIP) torch || \
	    { echo 'Cannot install torch $(TORCH) for Python $(VERSION) here; pip says why above' >&2; exit 1; }
	touch $@

$(VENV)/demo: $(VENV)/python pyproject.toml
	$(PIP) --editable '.[hf]' $(DETACH)
	touch $@

$(VENV)/test: $(VENV)/python pyproject.toml
	$(PIP) --editable '.[hf,test]' $(DETACH)
	touch $@

$(VENV)/integrations: $(VENV)/python pyproject.toml
	$(PIP) --editable '.[integrations,test]' $(DETACH)
	touch $@

$(VENV)/dev: $(VENV)/python pyproject.toml
	$(PIP) --editable '.[dev]' $(DETACH)
	touch $@

$(VENV)/docs: $(VENV)/python pyproject.toml
	$(PIP) --editable '.[docs]' $(DETACH)
	touch $@

clean:
	rm -rf $(VENV)
