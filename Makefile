# Two commands set everything up on a machine with Python 3.11 or later and make:
#   make train    install, train an EM operator on point clouds, and write its table and pictures to lightning_logs/
#   make test     install, and run all tests
#   make nightly  the property tests with 5,000 new examples each, in place of the 200 of make test
#   make fuzz     10,000 mutated files for every reader
#   make coverage the tests under a tracer; it fails where fewer than 95 % of the branches are taken
# Both keep what they install in .venv; ARGS="..." is handed on. For those who change something there are make lint and
# make docs, which builds the documentation into site/.
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

# Not those of the wheel, which is installed beside the checkout and timed.
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
