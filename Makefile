# `make demo` and `make test` need Python 3.11 to 3.13 and a package index; they make .venv themselves.
# On a machine without a GPU, a CPU build of torch saves gigabytes: make demo TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
PYTHON ?= python3.11
TORCH ?= torch==2.13.0
BIN := .venv/bin
# One thread a process: several test processes on few cores otherwise slow each other down tenfold.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

.PHONY: demo test team processes faults check lint types bench mutations wheel clean

demo: .venv/installed
	$(BIN)/rlhf run demo

test: .venv/installed
	$(TEST_ENV) $(BIN)/pytest -n 2 --dist worksteal --ignore tests/team --ignore tests/processes --ignore tests/faults

# `rlhf up` as a whole: real servers, a worker, a browser (chromium) where there is one. Each of the two processes has one.
team: .venv/installed
	$(TEST_ENV) $(BIN)/pytest -n 2 --dist loadfile tests/team

# Other whole processes: sweeps, launchers, a full disk, servers of their own, report and MLflow in a browser.
processes: .venv/installed
	$(TEST_ENV) $(BIN)/pytest -n 2 --dist loadfile tests/processes

# Each fault at three random moments; docs/reliability.md has the table, and says how to make it.
faults: .venv/installed
	$(TEST_ENV) $(BIN)/pytest -n 2 --dist worksteal tests/faults

check: lint types test team processes

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: .venv/installed
	$(BIN)/mypy

bench: .venv/installed
	$(BIN)/python tests/bench/up_to_date.py

mutations: .venv/installed
	$(BIN)/python tests/mutations.py

wheel: .venv/installed
	bash tests/wheel.sh

clean:
	rm -rf .venv .rlhf dist .pytest_cache .mypy_cache .ruff_cache

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@
