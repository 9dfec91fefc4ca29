# Two commands set everything up on a machine with Python 3.10 or later and make:
#   make train    install, train an EM operator on point clouds, and write its table and pictures to lightning_logs/
#   make test     install, and run all tests
#   make nightly  the property tests with 5,000 new examples each, in place of the 200 of make test
#   make fuzz     10,000 mutated files for every reader
# Both keep what they install in .venv; ARGS="..." is handed on. For those who change something there are make lint and
# make docs, which builds the documentation into site/.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: train test nightly fuzz lint docs clean

train: $(INSTALLED)
	$(BIN)/em-lightning run point_cloud_gmm $(ARGS)

test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 -q $(ARGS)

nightly: $(INSTALLED)
	HYPOTHESIS_PROFILE=nightly $(BIN)/python -m pytest -n 2 -q tests/test_properties_*.py $(ARGS)

fuzz: $(INSTALLED)
	$(BIN)/python tests/fuzz_readers.py $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet $(ARGS)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "$(PYTHON) is older than 3.10; name a newer one: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) site
