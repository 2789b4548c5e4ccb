# make demo    install, then run the whole pipeline on an embedded checkpoint and real digits
# make test    install, then run the tests
# make check   ruff, mypy --strict, import-linter
# make site    the documentation, strictly, into build/site
# make dist    sdist and wheel into dist/, checked
# make figures the figures of README and docs that take minutes, beside what is stated
# make lock    pin the newest versions that fit; make locked installs the pinned ones

VENV ?= .venv
PY := $(VENV)/bin/python
PYTHON ?= python3
WORKERS ?= 2

.PHONY: demo test test-slow check format clean site dist figures lock locked

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

$(VENV)/.docs: $(VENV)/.installed
	$(PY) -m pip install --quiet --disable-pip-version-check -e ".[docs]"
	touch $@

site: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

dist: $(VENV)/.installed
	rm -rf dist
	$(PY) -m build
	$(PY) -m pip install --quiet --disable-pip-version-check twine
	$(PY) -m twine check --strict dist/*
	@ls -l dist

figures: $(VENV)/.installed
	$(PY) benchmarks/figures.py --run

lock: $(VENV)/.installed
	$(PY) -m pip install --quiet --disable-pip-version-check uv
	$(PY) -m uv pip compile pyproject.toml --universal --python-version 3.11 --upgrade --quiet --no-annotate --no-header \
	  --no-emit-index-url --extra search --extra zoo -o requirements.lock
	$(PY) -m uv pip compile pyproject.toml --universal --python-version 3.11 --upgrade --quiet --no-annotate --no-header \
	  --no-emit-index-url --extra search --extra zoo --extra dev --extra docs -c requirements.lock -o requirements-dev.lock

locked:
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.lock
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $(VENV)/.installed

format: $(VENV)/.installed
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
