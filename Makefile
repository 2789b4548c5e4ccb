# make demo    install, then run the whole pipeline on an embedded checkpoint and real digits
# make test    install, then run the tests
# make check   ruff, mypy --strict, import-linter

VENV ?= .venv
PY := $(VENV)/bin/python
PYTHON ?= python3
WORKERS ?= 2

.PHONY: demo test test-slow check format clean

$(VENV)/.installed: pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@echo "installing torch, the runtimes and the test tools (some 6 GB) into $(VENV)"
	$(PY) -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@

demo: $(VENV)/.installed
	$(VENV)/bin/rescompress run examples/demo.yaml
	$(VENV)/bin/rescompress report rescompress-out/demo -o rescompress-out/demo/report.html --open

test: $(VENV)/.installed
	$(PY) -m pytest -n $(WORKERS) --dist loadfile

test-slow: $(VENV)/.installed
	$(PY) -m pytest -n $(WORKERS) --dist loadfile -m slow

check: $(VENV)/.installed
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/lint-imports

format: $(VENV)/.installed
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
