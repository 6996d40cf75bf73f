# make demo   set up what the demo needs and compare methods on the bundled model
# make test   set up for development and run the tests
# make lint   check style, types and the direction of imports
# make venv   set up for development only
# make peers  set up kvpress, which asks for another transformers, in an environment of its own: tokenry bench kvcache
# make clean  remove caches and build outputs
#
# Variables: PYTHON (3.11 or newer), WORKERS (processes that the tests run in, a core each), PIP_ARGS (for example an
# index with CPU-only builds of torch, which saves gigabytes on Linux), DEMO (the demo's command).

PYTHON ?= python3
PIP_ARGS ?=
WORKERS ?= 2
DEMO ?= compare --demo --html runs/demo.html --json runs/demo.json

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(PIP_ARGS)

.PHONY: demo test lint venv peers clean

demo: .venv/.run
	$(BIN)/tokenry $(DEMO)

test: .venv/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

venv: .venv/.dev

peers: .venv-peers/.installed

# Stamps: a change of the dependencies installs again.
.venv/.run: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing Tokenry and what it runs on into .venv (torch is large: this can take some minutes) ..."
	@$(PIP) -e .
	@touch $@

.venv/.dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing Tokenry and its development tools into .venv (torch is large: this can take some minutes) ..."
	@$(PIP) -e '.[dev]'
	@touch $@ .venv/.run

# Torch is the same release here and there, so that figures are of the same products.
.venv-peers/.installed: peers.txt constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Tokenry needs Python 3.11 or newer; name one: make PYTHON=python3.12"; exit 1; }
	@echo "Installing kvpress and what it runs on into .venv-peers (this can take some minutes) ..."
	@$(PYTHON) -m venv .venv-peers
	@.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -r peers.txt \
		"$$(grep '^torch==' constraints.txt)"
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Tokenry needs Python 3.11 or newer; name one: make PYTHON=python3.12"; exit 1; }
	@echo "Creating .venv ..."
	@$(PYTHON) -m venv .venv

clean:
	rm -rf build dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
