# demo and test each set themselves up from a bare checkout; nothing here needs root or a GPU.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint types setup clean

setup: $(VENV)/.ready

$(VENV)/.ready: requirements-cpu.lock pyproject.toml setup_venv.sh
	PYTHON=$(PYTHON) ./setup_venv.sh $(VENV)

demo: setup
	$(BIN)/keel train demo --fresh

test: setup
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

clean:
	rm -rf build *.egg-info .pytest_cache .mypy_cache .ruff_cache
