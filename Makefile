# `make demo` and `make test` prepare .venv themselves; nothing else has to be installed first.
# Another interpreter: make test PYTHON=/path/to/python (3.11 or newer).

PYTHON ?= python3.11 python3.12 python3.13 python3
BIN := .venv/bin
INSTALLED := .venv/.installed
SUITABLE := import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1
# pyright would ask the package index for a newer version of itself at every run
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.PHONY: help demo test check format soak docs clean

help:
	@echo "make demo    select training data from text on this machine, end to end, with a report"
	@echo "make test    lint, format check, type check and all tests"
	@echo "make check   the same without the tests"
	@echo "make format  rewrite the sources in the project's format"
	@echo "make soak    the long fault matrices"
	@echo "make docs    the site, in docs/_build"
	@echo "make clean   remove .venv, caches and the demo's data (never a store)"

demo: $(INSTALLED)
	$(BIN)/python examples/build_corpus.py --out examples/data --max-mb 8
	$(BIN)/stillhouse run examples/select.yaml

test: check
	$(BIN)/python -m pytest -n 2 --dist loadscope

check: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

format: $(INSTALLED)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

soak: $(INSTALLED)
	$(BIN)/python -m pytest -m soak --timeout 3600

docs: $(INSTALLED)
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build

# The tools are installed for the demo too: its data are read from the installed packages, and so
# stay the same before and after `make test`.
$(INSTALLED): pyproject.toml constraints.txt
	@for python in $(PYTHON); do \
		if "$$python" -c '$(SUITABLE)' 2>/dev/null; then \
			echo "$$python -m venv .venv"; exec "$$python" -m venv .venv; \
		fi; \
	done; \
	echo "No Python 3.11 or newer with the venv module among: $(PYTHON)." >&2; \
	echo "Install one, or name it: make PYTHON=/path/to/python" >&2; \
	exit 1
	$(BIN)/python -m pip install --progress-bar off -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf docs/_build .venv .pytest_cache .ruff_cache .hypothesis build dist *.egg-info examples/data
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
