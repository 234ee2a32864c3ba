# make train | test | pytest | lint | test-versions | test-cpus | setup | bench | clean
#
# `train` and `test` create .venv with the pinned packages of constraints.txt when it is missing or
# when the pins changed. Settings, as `make train PYTHON=python3.12 ARGS="trainer.max_steps=20"`:
#   PYTHON       the interpreter, Python 3.10 to 3.13
#   VENV         the environment's folder; `VENV=` (empty) uses PYTHON with the packages it has
#   ARGS         Hydra overrides for `train`, which is experiment=first_run unless they name one;
#                options for `bench`
#   PYTEST_ARGS  options for pytest, e.g. `PYTEST_ARGS="tests/data -x"`
#   PIP_ARGS     options for pip, e.g. another package index
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
PYTEST_ARGS ?= -n 2 --dist loadgroup --no-loadscope-reorder
PIP_ARGS ?=
OLDEST_TRITON := 3.6.0
BETWEEN_TRITON := 3.8.0
NEWEST_TRITON := 3.9.0
OLDEST_TRANSFORMERS := 5.17.0
NEWEST_TRANSFORMERS := 5.24.0
OLDEST_LIGHTNING := 2.6.0
VERSION_FOLDER := $(CURDIR)/build/other-versions

ifeq ($(strip $(VENV)),)
PY := $(PYTHON)
SETUP := system-python
TRITONS :=
else
PY := $(VENV)/bin/python
SETUP := $(VENV)/.installed
TRITONS := $(foreach v,$(OLDEST_TRITON) $(BETWEEN_TRITON) $(NEWEST_TRITON),$(VENV)/triton-$(v))
endif

export OMP_NUM_THREADS ?= 2
export TOKENIZERS_PARALLELISM ?= false
# Images of containers often set it; then every process of the tests compiles torch's modules again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: train test pytest setup test-versions test-versions-oldest test-versions-newest \
	test-versions-sample test-cpus lint bench clean system-python check-python

train: $(SETUP)
	$(PY) -m lctrain.train $(if $(findstring experiment=,$(ARGS)),,experiment=first_run) $(ARGS)

test: lint pytest

pytest: setup
	OMP_NUM_THREADS=1 $(PY) -m pytest $(PYTEST_ARGS)

setup: $(SETUP) $(TRITONS)

# The tests of what touches transformers and Lightning, on both ends of their ranges. The newest
# transformers needs Python 3.11.
test-versions: test-versions-oldest test-versions-newest

test-versions-oldest: PACKAGES := "transformers==$(OLDEST_TRANSFORMERS)" "huggingface_hub<2" \
	"lightning==$(OLDEST_LIGHTNING)" "pytorch-lightning==$(OLDEST_LIGHTNING)"
test-versions-newest: PACKAGES := "transformers==$(NEWEST_TRANSFORMERS)"

test-versions-oldest test-versions-newest: $(SETUP)
	@rm -rf "$(VERSION_FOLDER)/$@"
	@$(PY) -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) --no-deps --no-compile \
	  --target "$(VERSION_FOLDER)/$@" $(PACKAGES)
	@echo "Testing with $(subst ",,$(PACKAGES))"
	@PYTHONPATH="$(VERSION_FOLDER)/$@" OMP_NUM_THREADS=1 $(PY) -m pytest $(PYTEST_ARGS) \
	  -m "not slow" $(VERSION_TESTS)
	@rm -rf "$(VERSION_FOLDER)/$@"

# The tests of numbers on other instruction sets, without oneDNN, and with other thread counts: a
# verdict must not depend on the CPU. CI runs a sample (.ci/run).
test-cpus: $(SETUP)
	@failed=0; for setting in $(CPU_SETTINGS); do \
	  echo "Testing with $$setting"; \
	  env $$setting $(PY) -m pytest $(PYTEST_ARGS) -m "not slow" $(CPU_TESTS) || failed=1; \
	done; exit $$failed

CPU_SETTINGS ?= "ATEN_CPU_CAPABILITY=default OMP_NUM_THREADS=1" \
  "ATEN_CPU_CAPABILITY=avx2 OMP_NUM_THREADS=2" "LCTRAIN_TEST_ONEDNN=off OMP_NUM_THREADS=3"
CPU_TESTS ?= tests --ignore=tests/docs --ignore=tests/house --ignore-glob='*aot*'

VERSION_TESTS := tests/attention tests/models tests/train tests/test_module.py

# What CI runs of it: less than a minute per end.
test-versions-sample:
	@$(MAKE) test-versions VERSION_TESTS="$(VERSION_SAMPLE)"

VERSION_SAMPLE := tests/attention tests/models/test_packed_equals_separate.py \
	tests/models/test_fused.py tests/models/test_inputs.py tests/models/test_sweep.py \
	tests/models/test_continuous_batching.py tests/models/test_static_cache.py tests/test_module.py

lint: $(SETUP)
	@if [ -z "$(strip $(VENV))" ] && ! $(PY) -c 'import mypy, ruff' 2>/dev/null; then \
	  echo "Not linted: $(PYTHON) has no ruff or mypy."; \
	else \
	  set -ex; \
	  $(PY) -m ruff check .; \
	  $(PY) -m ruff format --check .; \
	  $(PY) tests/house/typecheck.py; \
	fi

bench: $(SETUP)
	$(PY) -m lctrain.bench $(ARGS)

clean:
	rm -rf .venv build dist lctrain.egg-info .pytest_cache .ruff_cache .mypy_cache

check-python:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "lctrain needs Python 3.10 to 3.13; '$(PYTHON)' was not found." \
	    "Name one: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || { \
	  echo "lctrain needs Python 3.10 to 3.13, got $$($(PYTHON) --version 2>&1)." \
	    "Name another: make PYTHON=/path/to/python3.12" >&2; exit 1; }

ifeq ($(strip $(VENV)),)
# The interpreter's own packages (a GPU machine set up by someone else): only lctrain is installed.
system-python: check-python
	@$(PYTHON) -c 'import sys; sys.path = [p for p in sys.path if p]; import lctrain; \
	  assert lctrain.__file__.startswith("$(CURDIR)/")' 2>/dev/null || \
	  $(PYTHON) -m pip install --quiet --no-deps --no-build-isolation $(PIP_ARGS) -e "$(CURDIR)"
else
$(PY): | check-python
	@$(PYTHON) -m venv $(VENV) || { \
	  echo "$(PYTHON) could not create $(VENV). Install its venv module (Debian: python3-venv)" >&2; \
	  rm -rf $(VENV); exit 1; }

$(SETUP): constraints.txt pyproject.toml | $(PY)
	@echo "Installing the pinned packages into $(VENV)"
	$(PY) -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt \
	  setuptools wheel
	$(PY) -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt \
	  --no-build-isolation -e ".[dev]"
	@touch $@

# The two ends of the supported Triton range and what neither they nor constraints.txt have of it,
# for the ahead-of-time compilation tests.
$(VENV)/triton-%: | $(PY)
	@rm -rf $@
	$(PY) -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) --no-deps --no-compile \
	  --target $@.part triton==$*
	@rm -rf $@ && mv $@.part $@ && touch $@
endif
