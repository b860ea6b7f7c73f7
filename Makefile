# make train   set up, then train the GRPO agent on the embedded model and report (about seven minutes)
# make test    set up, then run the tests, but for the slow ones
# make test-slow    set up, then run the slow tests: whole commands, one after another
# make lint    set up, then check style and types
# make test-floor   the tests with the lowest versions that pyproject.toml allows, in an environment of their own;
#                   PyPI's torch of that age brings CUDA along (gigabytes), FLOOR_PIP can name another index
# make fuzz    set up, then try some 20,000 invented inputs on every door (tests/fuzz)
# make interruptions   set up, then stop some 800 saves and twenty trainings at random moments (about ten minutes)
# Options reach the command through ARGS:  make train ARGS="--seed 1"

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
FLOOR := .venv-floor/.ready

.PHONY: train test test-slow test-floor fuzz interruptions lint clean
.DEFAULT_GOAL := test

$(READY): pyproject.toml .ci/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "grip-env needs Python 3.10 or newer; try: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c .ci/constraints.txt -e '.[dev]'
	@touch $@

train: $(READY)
	$(BIN)/python -m grip_env.train --algo grpo $(ARGS)

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow" $(ARGS)

test-slow: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m slow $(ARGS)

$(FLOOR): pyproject.toml .ci/floor.txt
	$(PYTHON) -m venv .venv-floor
	.venv-floor/bin/python -m pip install --quiet --disable-pip-version-check $(FLOOR_PIP) -c .ci/floor.txt -e '.[dev]'
	@touch $@

test-floor: $(FLOOR)
	.venv-floor/bin/python -m pytest $(ARGS)

fuzz: $(READY)
	FUZZ_EXAMPLES=2000 $(BIN)/python -m pytest tests/fuzz $(ARGS)

interruptions: $(READY)
	$(BIN)/python -m tests.interruptions $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv .venv-floor build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
