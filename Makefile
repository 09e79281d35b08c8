# Needs a C++ compiler, make, and python3 (3.10 or newer) with venv; the rest comes into .venv.
# After the first run no target needs the network, until pyproject.toml changes.

PYTHON ?= python3
BIN    := .venv/bin
APT    := on Debian, Ubuntu and JetPack: sudo apt install build-essential python3-venv

.PHONY: help demo test bench lint format clean

help: ## Show this list
	@sed -n 's/^\([a-z]*\):.*## /\1	/p' $(MAKEFILE_LIST) | expand -t 10

demo: $(if $(TUNE),.venv/.dev,.venv/.base) ## Set everything up and run the main job (first time: up to 15 minutes); TUNE=1 tunes the router, too
	$(BIN)/remoe-edge build
	$(BIN)/remoe-edge demo $(if $(TUNE),--tune)

test: .venv/.dev ## Set everything up and pass the tests
	$(BIN)/pytest -m "not runtime"
	$(BIN)/remoe-edge build
	$(BIN)/pytest -m runtime

bench: .venv/.base ## The benchmark matrix: make bench [ARGS=--help], or one model: make bench MODEL=model.gguf [ARGS=...]
	$(BIN)/remoe-edge build
	$(if $(MODEL),$(BIN)/remoe-edge bench $(MODEL),$(BIN)/python scripts/bench_matrix.py) $(ARGS)

lint: .venv/.dev ## Check style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format: .venv/.dev ## Bring all sources into style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CPP)

clean: ## Delete .venv and tool caches here (the runtime's cache: remoe-edge build --clean)
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist

CPP = $(shell find patches/sources -name '*.h' -o -name '*.c' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.venv/.base: pyproject.toml | .venv/bin/pip
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[build]'
	@touch $@

.venv/.dev: pyproject.toml | .venv/bin/pip
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[build,dev]'
	@touch $@ .venv/.base

.venv/bin/pip:
	@command -v $${CXX:-c++} >/dev/null || { echo "Error: no C++ compiler found; $(APT)" >&2; exit 1; }
	@command -v $(PYTHON) >/dev/null || { echo "Error: no python3 found; $(APT)" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Error: Python 3.10 or newer is needed; name one with: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "Error: $(PYTHON) has no venv; $(APT)" >&2; exit 1; }
	@$(PYTHON) -m venv .venv
