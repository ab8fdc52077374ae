# make quickstart and make test do all of their own set-up in .venv; a second call installs nothing.
# ARGS passes options on: make test ARGS="-k recipe", make quickstart ARGS="--seed 3".

VENV := .venv
BIN := $(VENV)/bin
CORE := $(VENV)/.core-installed
DEV := $(VENV)/.dev-installed
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
CANDIDATES := python3 python3.14 python3.13 python3.12 python3.11 python
ENOUGH := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))

.PHONY: help quickstart test fuzz reliability soak lint format typecheck methods bench bench-data clean
.DELETE_ON_ERROR:

help:
	@echo "make quickstart   SFT, DPO and the comparison on an embedded tiny model, with a report (minutes, CPU)"
	@echo "make test         every test"
	@echo "make soak         200 kills of real runs, compared byte by byte (ARGS=\"--kills 50\" for fewer)"
	@echo "make lint         ruff: rules and format        make typecheck   mypy --strict on src"
	@echo "make fuzz         10,000 damaged files, none of which may crash, hang or fill the memory"
	@echo "make reliability  run what docs/reliability.md names and write the page anew"
	@echo "make format       let ruff rewrite              make bench       measure against TRL"
	@echo "make methods      100 steps of every method on real preferences, beside the kept curves (needs ../shared)"
	@echo "make clean        remove .venv, caches and builds; runs/ stays"

quickstart: $(CORE)
	$(BIN)/tunesmith quickstart $(ARGS)

test: $(DEV)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

soak: $(DEV)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.support.kill_soak $(ARGS)

fuzz: $(DEV)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz.run --cases 10000 --json benchmarks/results/fuzz.json $(ARGS)

reliability: $(DEV)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.reliability.page $(ARGS)

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: $(DEV)
	$(BIN)/mypy

methods: $(DEV)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.methods.real $(ARGS)

bench: $(CORE)
	bash benchmarks/bench.sh $(ARGS)
	$(if $(ARGS),,MODULE=benchmarks.data.compare bash benchmarks/bench.sh)
	$(if $(ARGS),,MODULE=benchmarks.methods.agree_trl bash benchmarks/bench.sh)

bench-data: $(CORE)
	MODULE=benchmarks.data.compare bash benchmarks/bench.sh $(ARGS)

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is touched last, so an interrupted set-up is done again.
$(BIN)/pip:
	@for python in $(PYTHON) $(CANDIDATES); do \
	  if "$$python" -c "$(ENOUGH)" >/dev/null 2>&1; then \
	    echo "Making $(VENV) with $$("$$python" --version)."; \
	    exec "$$python" -m venv $(VENV); \
	  fi; \
	done; \
	echo "Tunesmith needs Python 3.11 or newer with pip and venv; none of: $(PYTHON) $(CANDIDATES) is one." >&2; \
	echo "  Install it (Debian: apt install python3 python3-venv), or name one: make quickstart PYTHON=/path/to/python3" >&2; \
	exit 1

$(CORE): pyproject.toml constraints.txt | $(BIN)/pip
	@echo "Installing Tunesmith into $(VENV); the first time this takes some minutes."
	@$(PIP) --editable .
	@touch $@

$(DEV): pyproject.toml constraints.txt | $(BIN)/pip
	@echo "Installing Tunesmith and its test tools into $(VENV); the first time this takes some minutes."
	@$(PIP) --editable '.[dev]'
	@touch $(CORE) $@
