# The project's commands. `make up` and `make test` set up what they need; a second run of set-up is instant.

PYTHON ?= python3.11 python3.12 python3.13 python3
PYTEST_WORKERS ?= 2
PYTEST_ARGS ?=
ARGS ?=
BENCH ?=
SOAK ?= 10
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help setup up test check format protos docs bench soak clean

help: ## list these commands
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1\t\2/p' Makefile | expand -t 14

setup: ## make .venv and install the project there with everything it needs; PYTHON=… names a Python
	@$(BIN)/python deploy/setup.py --done 2>/dev/null || { \
	for python in $(PYTHON); do \
		$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && exec $$python deploy/setup.py; \
	done; \
	echo "setup: none of these is a Python of 3.11 or newer: $(PYTHON). Install one, or name it: make PYTHON=…" >&2; \
	exit 1; }

up: setup ## start the mesh on this machine; flags in ARGS="--prefill 2 …"
	@$(BIN)/pdmesh up $(ARGS)

test: check ## all checks and the whole test suite; more for pytest in PYTEST_ARGS
	@$(BIN)/python -m pytest --numprocesses $(PYTEST_WORKERS) --dist loadfile $(PYTEST_ARGS)

check: setup ## style, types, import arrows, protos
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/buf lint protos
	@$(BIN)/python protos/generate.py --check

format: setup ## rewrite the code in its one style
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

protos: setup ## generate protos/gen from protos/pdmesh
	@$(BIN)/python protos/generate.py

docs: setup ## write the tables of docs/rooms.md and docs/settings.md from the code
	@$(BIN)/python docs/generate.py

bench: setup ## list the benchmarks, or run one: BENCH=name ARGS="…"
ifeq ($(BENCH),)
	@for file in benchmarks/*.py; do echo "make bench BENCH=$$(basename $$file .py)"; done
else
	@$(BIN)/python benchmarks/$(BENCH).py $(ARGS)
endif

soak: setup ## everything that starts or breaks real services, at full size, SOAK times over, one after the other
	@for round in $$(seq $(SOAK)); do PDMESH_SOAK=1 $(BIN)/python -m pytest -m "mesh or fault" $(PYTEST_ARGS) || exit 1; done

clean: ## remove environments, caches and build results
	rm -rf .venv .venv-* build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
