# Every target makes .venv when it is missing; nothing else has to be installed by hand.
PYTHON ?= python3
BIN := .venv/bin
PYTEST := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo demo-images test test-all lint format docs clean

demo: .venv/installed
	$(BIN)/python recipes/demo.py

demo-images: .venv/installed
	$(BIN)/python recipes/demo_images.py

test: lint
	$(PYTEST)

test-all: lint
	$(PYTEST) -m ""

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: .venv/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	$(BIN)/zensical build --clean --strict
	@echo "open runs/site/index.html"

clean:
	rm -rf .venv runs .mypy_cache .ruff_cache .pytest_cache .hypothesis

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed, this is ' + sys.version.split()[0] + '; name another one with: make PYTHON=python3.12 ...')"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	@echo "installing the packages into .venv: about 6 GB, some minutes"
	$(BIN)/python -m pip install --constraint constraints.txt --editable ".[train,eval,report,ray,demo,dev]"
	touch $@
