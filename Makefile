# Two commands matter: `make fit` and `make test`. Both create .venv and install what they need first.

VENV   ?= .venv
PYTHON ?=
OVERRIDES ?=
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.domainssl-installed
# Tests run in two processes of one thread each; JOBS=0 runs them in one.
JOBS   ?= 2
# A process that crashes ends the run: pytest-xdist would start another and may wait for ever.
PYTEST  = OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PY) -m pytest -n $(JOBS) --dist loadfile --max-worker-restart=0 --durations=20
FAST   := not slow and not gpu and not online and not multigpu
SLOW   := slow and not gpu and not online and not multigpu

.DEFAULT_GOAL := help
.PHONY: help install fit test test-slow lint docs wheel clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

# The interpreter is the first of these that is Python 3.11, 3.12 or 3.13; PYTHON=... decides otherwise.
$(PY):
	@for candidate in $(PYTHON) python3 python3.13 python3.12 python3.11 python; do \
	  if $$candidate -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then \
	    echo "creating $(VENV) with $$($$candidate --version)"; \
	    exec $$candidate -m venv $(VENV); \
	  fi; \
	done; \
	echo "No Python 3.11, 3.12 or 3.13 found. Install one, or name it: make PYTHON=/path/to/python3.11" >&2; \
	exit 1

# Installed again only when the requirements change.
$(STAMP): pyproject.toml constraints.txt | $(PY)
	@echo "installing into $(VENV): some gigabytes, a few minutes"
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[all,dev]'
	@touch $@

install: $(STAMP) ## create .venv and install everything into it

fit: $(STAMP) ## train CROMA on the embedded SSL4EO-S12 sample (OVERRIDES="--trainer.max_epochs=1" adds options)
	$(PY) -m domainssl fit --config recipes/ssl4eo_croma.yaml $(OVERRIDES)

test: $(STAMP) ## default tests: CPU, offline, a few minutes
	$(PYTEST) -m "$(FAST)"

# pytest ends with 5 when no test is marked slow: said, not hidden, and not an error.
test-slow: $(STAMP) ## tests that need longer
	@$(PYTEST) -m "$(SLOW)"; code=$$?; \
	if [ $$code -eq 5 ]; then echo "test-slow: no test is marked slow, nothing was run"; exit 0; fi; \
	exit $$code

lint: $(STAMP) ## ruff, format check, mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

docs: $(STAMP) ## build the documentation, warnings are errors
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

wheel: $(STAMP) ## build wheel and sdist into dist/
	$(PY) -m build --no-isolation

clean: ## remove what the targets above produced, except .venv
	rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache
