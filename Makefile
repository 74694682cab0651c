# demo and test each set themselves up from a bare checkout; nothing here needs root or a GPU.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test guard-experiment guard-experiment-quick lint types setup clean

setup: $(VENV)/.ready

$(VENV)/.ready: requirements-cpu.lock pyproject.toml setup_venv.sh
	PYTHON=$(PYTHON) ./setup_venv.sh $(VENV)

demo: setup
	$(BIN)/keel train demo_online --set name=demo --fresh

# The test bed of the guard: reward hacking provoked on purpose. 22 runs, up to 90 minutes; goes on where it was stopped.
guard-experiment: setup
	$(BIN)/python -m examples.guard_experiment.run

guard-experiment-quick: setup
	$(BIN)/python -m examples.guard_experiment.run --quick

test: setup
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

clean:
	rm -rf build *.egg-info .pytest_cache .mypy_cache .ruff_cache
