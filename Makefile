# Every target except clean first installs the package into .venv. Requires Python 3.11 or later.
#   make train    train an EM operator on point clouds; write its table and figures to lightning_logs/
#   make test     run all tests
#   make lint     run ruff and mypy
#   make docs     build the documentation into site/
#   make nightly  run the property tests with 5,000 examples each instead of 200
#   make fuzz     run every file reader on 10,000 mutated files
#   make coverage run the tests with branch coverage; fail below 95 %
# ARGS="..." is passed to the command of a target.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: train test nightly fuzz coverage lint docs clean

train: $(INSTALLED)
	$(BIN)/em-lightning run point_cloud_gmm $(ARGS)

test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 -q $(ARGS)

nightly: $(INSTALLED)
	HYPOTHESIS_PROFILE=nightly $(BIN)/python -m pytest -n 2 -q tests/test_properties_*.py $(ARGS)

fuzz: $(INSTALLED)
	$(BIN)/python tests/fuzz_readers.py $(ARGS)

# The wheel tests are excluded because they measure an installed copy.
coverage: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 -q --ignore=tests/test_wheel.py --cov --cov-report=term \
		--cov-report=json:.coverage.json $(ARGS)
	$(BIN)/python -c 'import json, sys; share = json.load(open(".coverage.json"))["totals"]["percent_branches_covered"]; \
		print(f"branches: {share:.1f} %"); sys.exit(share < 95)'

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet $(ARGS)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than 3.11; name a newer one: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) site .coverage*
