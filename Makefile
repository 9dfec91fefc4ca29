# Two commands set everything up on a machine with make and Python 3.11 or later, which the pinned versions need:
#   make train     install, train an EM operator on point clouds, and write its table and figures to lightning_logs/
#   make test      install, run the fast tests, then those marked slow
# For developers:
#   make lint      ruff and mypy
#   make docs      build the documentation into site/
#   make newest    make test with the newest versions that pyproject.toml admits
#   make oldest    the fast tests with the oldest versions that it admits (PyTorch 2.6 needs Python 3.13 or older)
#   make portable  the fast tests with PyTorch's kernels for processors without AVX, and for AVX2
#   make nightly   faults of two hosts, unusual environments, and property tests with 5,000 new examples each, not 200
#   make fuzz      10,000 mutated files for every reader
#   make projects  run the callbacks and the audit on models as users write them; print which checks pass, and the time
#   make coverage  the tests with branch coverage; fails below 95 %
# newest and oldest install into .venv-newest and .venv-oldest, the others into .venv. ARGS="..." is passed on.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

PYTEST := -m pytest -n 2 -q
FAST := -m "not slow and not nightly"
SLOW := -m "slow and not nightly"

.PHONY: train test newest oldest portable nightly fuzz projects coverage lint docs clean

train: $(INSTALLED)
	$(BIN)/em-lightning run point_cloud_gmm $(ARGS)

test: $(INSTALLED)
	$(BIN)/python $(PYTEST) $(FAST) $(ARGS)
	$(BIN)/python $(PYTEST) $(SLOW) $(ARGS) || [ $$? -eq 5 ]  # 5: ARGS select no slow test

newest:
	$(PYTHON) -m venv $(VENV)-newest
	$(VENV)-newest/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager -e '.[dev]'
	$(VENV)-newest/bin/python $(PYTEST) $(FAST) $(ARGS)
	$(VENV)-newest/bin/python $(PYTEST) $(SLOW) $(ARGS)

# The lower bounds of the extra `all`, as exact versions. They give deprecation warnings about their newer dependencies.
# docs/support.md lists what fails with them.
OLDEST := $(VENV)-oldest/bin/python
oldest:
	$(PYTHON) -m venv $(VENV)-oldest
	$(OLDEST) .ci/lower_bounds.py > $(VENV)-oldest/lower_bounds.txt
	$(OLDEST) -m pip install --quiet -c $(VENV)-oldest/lower_bounds.txt -e '.[all]' pytest pytest-xdist hypothesis hatchling
	$(OLDEST) $(PYTEST) $(FAST) -W ignore::DeprecationWarning -W ignore::FutureWarning \
		-W ignore::pytest.PytestRemovedIn10Warning \
		--ignore=tests/test_docs.py --ignore=tests/test_tutorial.py --ignore=tests/test_wheel.py \
		--ignore=tests/test_device.py --ignore=tests/test_triton.py \
		--deselect='tests/test_callbacks_distributed.py::test_two_processes_equal_one[fsdp2]' \
		--deselect='tests/test_hostile.py::test_damaged_checkpoint_raises_with_its_name_and_runs_no_code[short]' \
		--deselect='tests/test_properties_activations.py::test_activations_of_any_input[grouped]' \
		--deselect=tests/test_callbacks_surgical.py::test_compiled_lightning_module \
		--deselect=tests/test_surgery.py::test_calls_of_relu_are_swapped_where_that_is_asked_for \
		--deselect=tests/test_modules.py::test_training_raises_the_held_out_likelihood_above_classical_em $(ARGS)

portable: $(INSTALLED)
	ATEN_CPU_CAPABILITY=default $(BIN)/python $(PYTEST) $(FAST) $(ARGS)
	ATEN_CPU_CAPABILITY=avx2 $(BIN)/python $(PYTEST) $(FAST) $(ARGS)

# -n 0: the tests of two hosts use one port, so they run one after another.
nightly: $(INSTALLED)
	$(BIN)/python $(PYTEST) -n 0 -m nightly tests/test_machines.py tests/test_environments.py
	HYPOTHESIS_PROFILE=nightly $(BIN)/python $(PYTEST) tests/test_properties_*.py $(ARGS)

fuzz: $(INSTALLED)
	$(BIN)/python tests/fuzz_readers.py $(ARGS)

projects: $(INSTALLED)
	$(BIN)/python tests/projects/table.py $(ARGS)

# Without the tests of the wheel: they run installed code, which is not measured, and take times, which measuring changes.
coverage: $(INSTALLED)
	$(BIN)/python $(PYTEST) --ignore=tests/test_wheel.py --cov --cov-report=term \
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
	rm -rf $(VENV) $(VENV)-newest $(VENV)-oldest site .coverage*
