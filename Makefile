# Every target sets up what it needs; all it asks of the machine is Python >= 3.11 and make.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
RUN    ?= runs/demo
SECONDS ?= 60
ROUNDS ?= 100

export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1

.PHONY: setup demo test test-fast test-full test-browser model fuzz lint bench chaos lock clean

setup: $(READY)

$(READY): requirements/lock.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "fedfuse needs Python 3.11 or newer; set PYTHON=/path/to/python3.11" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/lock.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

# The main job: six sites, three modalities, DP, secure aggregation, ledger, audit. RUN=folder to keep several.
demo: setup
	rm -rf $(RUN)
	$(BIN)/fedfuse simulate --scenario digits --out $(RUN)
	$(BIN)/fedfuse audit $(RUN)/ledger.jsonl

test: setup
	$(BIN)/python -m pytest -n auto --dist worksteal

test-fast: setup
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not slow and not browser and not deployment"

# testssl.sh looks at the server's end and libfaketime sets a site's clock; Debian's are installed where apt-get may do it.
test-full: setup
	@{ command -v testssl || command -v testssl.sh; } >/dev/null && command -v faketime >/dev/null || \
	  { apt-get update -qq && apt-get install -qq -y --no-install-recommends testssl.sh faketime >/dev/null; } || \
	  { echo "install both: as root, apt-get install testssl.sh faketime" >&2; exit 2; }
	$(BIN)/python -m pytest -n auto --dist worksteal -m ""

# Looks at a report in headless Chromium; Debian's is installed where there is none and apt-get may do it.
test-browser: setup
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null || \
	  { apt-get update -qq && apt-get install -qq -y --no-install-recommends chromium >/dev/null; } || \
	  { echo "install Chromium: as root, apt-get install chromium" >&2; exit 2; }
	$(BIN)/python -m pytest tests/browser -m browser

# Searches the Promela models to the end; spin is installed where apt-get may do it. Needs gcc as well.
model: setup
	@command -v spin >/dev/null || { apt-get update -qq && apt-get install -qq -y --no-install-recommends spin >/dev/null; } || \
	  { echo "install spin: as root, apt-get install spin" >&2; exit 2; }
	$(BIN)/python docs/model/check.py

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

# Coverage-guided fuzzing of every decoder, SECONDS each; inputs that broke something are kept in tests/fuzz/regressions.
fuzz: setup
	$(BIN)/python tests/fuzz/run.py --seconds $(SECONDS)

bench: setup
	$(BIN)/python bench/run.py $(ONLY)

# Random faults in a running deployment until ROUNDS rounds are opened; SEED=number repeats those of a run before.
chaos: setup
	$(BIN)/python tests/chaos/run.py --rounds $(ROUNDS) $(if $(SEED),--seed $(SEED))

# Rewrites the lock after pyproject.toml changed: hashes, and no address of any registry.
lock: setup
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	  --no-header --extra dev pyproject.toml --output-file requirements/lock.txt

clean:
	rm -rf $(VENV) dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis
