# make demo       quantize the digits model four ways and compare, with pictures
# make test       the default test suite
# make test-slow  the rest: thousands of random models, every resolution, compiled models
# make test-slow-sample  one of each kind of those, in minutes
# make test-gpu   what needs a CUDA device; without Triton, what does not launch kernels
# make test-triton  the CUDA kernels without a GPU: interpreted, and compiled to machine code
# make check      linters, types, import layers
# All of them make .venv and install what they need first.

PYTHON ?= python3
VENV ?= .venv
TRITON ?= .triton
BIN := $(VENV)/bin

.PHONY: demo test test-slow test-slow-sample test-gpu test-triton check venv clean

demo: $(VENV)/.installed
	$(BIN)/tfmq-fx demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest -q -n auto --dist worksteal

test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -q -n auto --dist worksteal -m slow

test-slow-sample: $(VENV)/.installed
	$(BIN)/python -m pytest -q -n auto --dist worksteal -m 'slow and sample'

test-gpu: $(VENV)/.installed
	$(BIN)/python -m pytest -q -n 8 --dist worksteal -m gpu tests/gpu

# Triton lies beside the environment, not in it: torch behaves as it does without.
test-triton: $(VENV)/.installed $(TRITON)/.installed
	PYTHONPATH=$(TRITON) TRITON_INTERPRET=1 \
		$(BIN)/python -m pytest -q -n auto -m triton tests/triton/interpreted
	PYTHONPATH=$(TRITON) $(BIN)/python -m pytest -q -m triton tests/triton/compiled

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

venv: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[demo,evaluate,dev]'
	touch $@

# Its interpreter fails with the newest numpy, so that it gets one of its own.
$(TRITON)/.installed: Makefile
	$(BIN)/python -m pip install --quiet --no-deps --target $(TRITON) triton==3.6.0 numpy==2.3.5
	touch $@

clean:
	rm -rf $(VENV) $(TRITON) demo-out build *.egg-info
