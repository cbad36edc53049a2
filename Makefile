# Everything sets itself up: only Python >= 3.11 and make are needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
WORKERS ?= 2

.PHONY: help demo test test-all conformance snapshot bench-mcp ui lint lock clean

help:
	@echo "make demo      synthetic shop with an incident; the whole loop; says where to look"
	@echo "make test      the test suite (under 10 minutes)"
	@echo "make test-all  the long tests too (under 90 minutes)"
	@echo "make ui        Dagster's UI on the demo shop"
	@echo "make lint      ruff"
	@echo "make lock      rewrite constraints.txt from the versions installed now"

$(READY): constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, this is %s; try: make PYTHON=python3.12" % sys.version.split()[0])'
	@echo "setting up $(VENV) (a minute or two, once)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools wheel
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $(READY)

demo: $(READY)
	@$(BIN)/retention-ops demo

test: $(READY)
	@$(BIN)/python -m pytest -m "not slow" -n $(WORKERS) --dist worksteal -q

test-all: $(READY)
	@$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -q

ui: $(READY)
	@$(BIN)/retention-ops --home .retention_ops/demo ui

lint: $(READY)
	@$(BIN)/ruff check .

lock: $(READY)
	@$(BIN)/python -m pip freeze --exclude-editable --all | grep -v '^pip==' > constraints.txt

clean:
	rm -rf $(VENV) build *.egg-info
