# make demo   the whole path in under ten minutes; pictures, a video and a results table in demo/
# make test   every check: format, lint, types, import contracts, tests
#
# Both make .venv first. Python 3.11 or newer and a C compiler are all that has to be there.

EXTRAS := agents,physics,nion,files,viz,dev
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
WORKERS ?= 2
# The pinned versions were resolved on 3.11, so it is asked first.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
# One thread per process: two on a busy machine wait for one another.
export OMP_NUM_THREADS ?= 1
export MPLBACKEND ?= Agg
export SDL_VIDEODRIVER ?= dummy

.PHONY: demo test lint types contracts unit install clean

demo: $(STAMP)
	$(BIN)/stem-gym demo

test: lint types contracts unit

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(STAMP)
	$(BIN)/mypy

contracts: $(STAMP)
	$(BIN)/lint-imports

unit: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS)

install: $(STAMP)

# Installed anew when a dependency may have changed; an existing .venv is kept and brought up to date.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "stem_gym needs Python 3.11 or newer; none was found. Name one: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[$(EXTRAS)]"
	touch $(STAMP)

clean:
	rm -rf demo runs build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
