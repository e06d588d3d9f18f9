# `make demo` and `make test` set up .venv themselves; a fresh clone needs Python >= 3.11 with venv and pip.
# Without a GPU, spare yourself gigabytes of CUDA:
#   make demo PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# A process for each core (TEST_WORKERS=0: none); a file's tests stay in one, which makes its fixtures once.
TEST_WORKERS ?= logical
PYTEST := $(BIN)/python -m pytest --numprocesses $(TEST_WORKERS) --maxprocesses 8 --dist loadfile --no-loadscope-reorder

.PHONY: help demo test test-slow test-gpu check docs bench clean

help:
	@echo "make demo       train on Sudoku twice, uniform masks beside PUMA, then solve puzzles (5 to 15 minutes on 2 cores)"
	@echo "make test       all tests that need neither minutes each nor a GPU"
	@echo "make test-slow  the tests that take minutes"
	@echo "make test-gpu   the tests that need a CUDA device"
	@echo "make check      formatting, lint, types and the documentation"
	@echo "make docs       the documentation as a site, in site/"
	@echo "make bench      a training step and decoding at the paper's Sudoku sizes, as JSON"
	@echo "make clean      remove .venv, caches and the demo's runs"

$(READY): pyproject.toml constraints.txt
	@echo "Setting up $(VENV): PyTorch and some small packages, a minute or more"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(READY)
	$(BIN)/python examples/demo.py

test: $(READY)
	$(PYTEST)

test-slow: $(READY)
	$(PYTEST) -m slow

test-gpu: $(READY)
	$(BIN)/python -m pytest -o addopts= -m gpu

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/zensical build --strict

docs: $(READY)
	$(BIN)/zensical build --strict
	@echo "open site/index.html, or run $(BIN)/zensical serve"

bench: $(READY)
	$(BIN)/unmask bench step sudoku/paper_uniform --json
	$(BIN)/unmask bench step sudoku/paper_puma --json
	$(BIN)/unmask bench decode sudoku/paper_puma --json

clean:
	rm -rf $(VENV) demo site .cache build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
