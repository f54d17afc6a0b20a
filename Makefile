# Every target makes its own .venv the first time, from pyproject.toml and the exact versions of constraints.txt.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: install demo test check bench clean

install: $(READY)

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[tasks,tensorboard,prometheus,dev]"
	touch $@

# A small convolutional network learns scanned digits on two workers.
demo: $(READY)
	$(BIN)/weft run digits --workers 2

# All tests but those marked slow (for these: .venv/bin/pytest -n 2 -m slow).
test: $(READY)
	$(BIN)/pytest -n 2

# What to run before every commit: style, types, who imports whom, and the tests that start no processes.
check: $(READY)
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest -q -n 2 -m "not slow and not multiprocess"

bench: $(READY)
	$(BIN)/python bench/allreduce.py --save
	$(BIN)/python bench/step.py --save
	$(BIN)/python bench/balance.py --save
	$(BIN)/python bench/reporting.py --save
	$(BIN)/python bench/local_sgd.py --save
	$(BIN)/python bench/codecs.py --save
	$(BIN)/python bench/split.py --save

# Runs (runs/) are the user's: they stay.
clean:
	rm -rf .venv build dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
