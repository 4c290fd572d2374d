# make demo       quantize the digits model four ways and compare, with pictures
# make test       the default test suite
# make test-slow  the rest: thousands of random models, every resolution, compiled models
# make check      linters, types, import layers
# All of them make .venv and install what they need first.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test test-slow check venv clean

demo: $(VENV)/.installed
	$(BIN)/tfmq-fx demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest -q -n auto --dist worksteal

test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -q -n auto --dist worksteal -m slow

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

venv: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[demo,dev]'
	touch $@

clean:
	rm -rf $(VENV) demo-out build *.egg-info
