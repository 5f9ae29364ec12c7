# `make demo` and `make test` need Python 3.11+, make and a package registry; nothing else.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# Under `uv run` Ray would start every worker through uv; recipes call the interpreter itself.
export RAY_ENABLE_UV_RUN_RUNTIME_ENV := 0
export RAY_USAGE_STATS_ENABLED := 0

# Random kills of commands, each followed by the same command: docs/reliability.md. KILLS=300 for the whole table.
.PHONY: setup demo test test-slow chaos lint bench style docs clean

setup: $(VENV)/.ready
$(VENV)/.ready: requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --requirements requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	touch $@

demo: setup
	$(BIN)/python -m jobs.demo

test: setup
	$(BIN)/python -m pytest -m "not slow and not gpu" $(ARGS)

test-slow: setup
	$(BIN)/python -m pytest -m "slow and not gpu" $(ARGS)

chaos: setup
	$(BIN)/python -m tests.chaos --kills $(or $(KILLS),50) --seed $(or $(SEED),0)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: setup
	for question in benchmarks/bench_*.py; do $(BIN)/python $$question || exit 1; done

style: setup
	$(BIN)/python benchmarks/style.py

# A warning is an error: a link that leads nowhere ends the build.
docs: setup
	$(BIN)/python docs/options.py
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html

clean:
	rm -rf $(VENV) build dist docs/_build *.egg-info .pytest_cache .ruff_cache .hypothesis
