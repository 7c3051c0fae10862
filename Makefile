# Two commands matter: `make demo` and `make test`. Both set everything up first, which takes minutes once (llama.cpp is
# compiled for this machine) and no time afterwards.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
TOOLS  := $(VENV)/.installed-test
PAGES  := $(VENV)/.installed-docs
FUZZ   := tests/unit/pml/test_pml_fuzz.py tests/unit/sessions/test_transcripts_fuzz.py tests/unit/layout/test_template_fuzz.py \
	tests/integration/test_pack.py::test_a_pack_brings_what_was_packed_or_nothing \
	tests/unit/store/test_store.py::test_a_file_gives_what_was_written_or_nothing
MODEL  := smollm2-135m-instruct

# Processes that tests run in. Two do the work of one in six tenths of the time on two cores.
JOBS   ?= auto
PYTEST := $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

.PHONY: demo check test coverage stress lint format docs model setup tools clean

demo: setup model
	@$(BIN)/cpucache demo

# The inner loop: what a change is held against every few minutes. Tests of properties try a fifth of their examples.
check: tools
	CPUCACHE_EXAMPLES=0.2 $(PYTEST) tests/unit
	@$(MAKE) --no-print-directory lint

test: tools model
	$(PYTEST)

# The same, and which lines and branches of the package it reaches: as a table of what is missed, and as pages in
# build/coverage/html. Ends with an error if it is less than what `fail_under` in pyproject.toml says.
coverage: tools model
	$(PYTEST) --cov --cov-report=term --cov-report=html

# The fuzz tests, twenty times as long as in `make test`, and processes that are killed: a quarter of an hour or more.
stress: tools
	CPUCACHE_EXAMPLES=20 $(PYTEST) $(FUZZ)
	$(PYTEST) -m stress

lint: tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: tools
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The documentation, into build/site. A broken link or anchor ends it; no network is used once the tools are there.
docs: $(PAGES)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "build/site/index.html"

setup: $(STAMP)

# What tests and linters need besides.
tools: $(TOOLS)

# Done again when the dependencies change.
$(STAMP): pyproject.toml
	@test -x $(BIN)/python || { echo "==> making a virtual environment in $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "==> installing cpucache and what it needs"
	@echo "    the first time, llama.cpp is compiled for this machine: about 6 minutes on 2 cores; pip keeps the result"
	@$(BIN)/python scripts/show_build.py "compiling llama.cpp" \
		$(BIN)/python -m pip install -v --disable-pip-version-check -e .
	@touch $(STAMP)

$(TOOLS): $(STAMP)
	@echo "==> installing what the tests need"
	@$(BIN)/python -m pip install --disable-pip-version-check -e '.[test]'
	@touch $(TOOLS)

$(PAGES): $(STAMP)
	@echo "==> installing what the documentation needs"
	@$(BIN)/python -m pip install --disable-pip-version-check -e '.[docs]'
	@touch $(PAGES)

# The model that the demo and the tests run on: 98 MB, fetched once and verified.
model: setup
	@$(BIN)/cpucache models path $(MODEL) >/dev/null 2>&1 || $(BIN)/cpucache models pull $(MODEL)

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
