# Every target sets up what it needs: `make demo` and `make test` work on a fresh clone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-full lint format bench chaos parity docs lock clean

help: ## Show what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Burnish needs Python 3.11 or newer; try: make $(MAKECMDGOALS) PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

setup: $(READY) ## Make .venv with everything for development, from the lock

demo: $(READY) ## Run the main job end to end on the CPU: train, evaluate, report
	$(BIN)/burnish demo --out runs/demo

test: $(READY) ## Run the tests (under 12 minutes on 2 cores)
	$(BIN)/python -m pytest -m "not slow" --numprocesses 2 --dist loadfile

test-full: $(READY) ## Run every test, the long ones too (about half an hour on 2 cores)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

lint: $(READY) ## Check style, types and who imports whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

format: $(READY) ## Bring the code into its format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY) ## Measure the data path and the training step against peers, quickly (bench/README.md)
	$(BIN)/python bench/data.py --quick
	$(BIN)/python bench/step.py --quick

chaos: $(READY) ## Kill a run at random instants and see that it ends as if nothing had happened
	$(BIN)/python bench/chaos.py

parity: $(READY) ## Compare our loss curve with those of OpenRLHF and TRL (docs/parity.md)
	$(BIN)/python bench/parity.py

docs: $(READY) ## Build the documentation into site/
	$(BIN)/python docs/generate.py
	$(BIN)/mkdocs build --quiet

lock: ## Write requirements.lock anew from pyproject.toml
	rm -rf build/lock && $(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install --quiet --upgrade pip
	build/lock/bin/python -m pip install --quiet torch==2.13.0
	build/lock/bin/python -m pip install --quiet --group dev --group docs '.[deepspeed,qlora]'
	{ sed -n '/^#/p' requirements.lock; build/lock/bin/python -m pip freeze --exclude burnish | sed 's/+cpu$$//'; } > build/requirements.lock
	mv build/requirements.lock requirements.lock

clean: ## Remove what these targets made
	rm -rf $(VENV) build runs site .pytest_cache .ruff_cache
