# `make demo` and `make test` do all the set-up on a fresh machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test check format torture fuzz clean

demo: $(STAMP)
	$(BIN)/cifarlab run ex1 --dataset digits --set train.epochs=20
	$(BIN)/cifarlab compare runs
	$(BIN)/cifarlab report runs
	@echo "Pictures, record and checkpoints: $$(ls -d runs/ex1/digits/* | tail -n 1)"
	@echo "All runs on one page: report.html"

# Each file's tests stay in one process: they share what was run for them. More than four need much memory.
test: $(STAMP)
	$(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist loadfile

check: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/pytest tests/test_imports.py

# Every fault of the disk, and kills, at every point of a run.
torture: $(STAMP)
	$(BIN)/python tests/torture.py

# Every parser of anything from outside, on damaged files, for so many minutes.
MINUTES ?= 10
fuzz: $(STAMP)
	for parser in pickle binary archive parquet image recipe record checkpoint; do \
		$(BIN)/python tests/fuzz.py $$parser --minutes $(MINUTES) || exit 1; done

format: $(STAMP)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# Installed again when the dependencies change.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache
