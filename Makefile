# Everything runs in .venv, which `make setup` builds from setup.py and constraints.txt.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The oldest PyTorch and Triton that are supported have an environment of their own.
OLD_VENV := .venv-triton-3.6
OLD_STAMP := $(OLD_VENV)/.installed
OLD_PINS := constraints-triton-3.6.txt
LINKS := build/mypy
SOURCES := $(wildcard sgmim_fast kernels tests benchmarks setup.py)
# pip draws progress bars on a terminal and stays quiet in a log.
QUIET := $(shell test -t 2 || echo --quiet)
fail = { echo "error: $(1)" >&2; exit 1; }

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup demo demo-compare check test test-triton-3.6 gpu-check clean distclean force

help:
	@echo "make setup      install everything into .venv (a few minutes, about 6 GB); again only when out of date"
	@echo "make demo       make a small data set, pre-train on it and write a report, on any machine"
	@echo "make demo-compare  the same with and without maps (SG-MIM, SimMIM), both judged and shown on one page"
	@echo "make check      lint, format, types and import direction"
	@echo "make test       run the tests"
	@echo "make gpu-check  test and time the kernels on a GPU, in under nine minutes; RESULTS=DIR takes the figures,"
	@echo "                SLICE=NAME does another part (python -m benchmarks.gpu_check --list-slices), SLICE=all all of"
	@echo "                them in 25 minutes; what is finished in RESULTS is not done again. With PYTHON=... nothing is"
	@echo "                set up: PyTorch, timm, pytest and hypothesis are enough"
	@echo "make test-triton-3.6  run the kernels' tests with the oldest supported PyTorch and Triton, in $(OLD_VENV)"
	@echo "make clean      remove build outputs, caches and what the demo wrote"
	@echo "make distclean  clean, and remove the environments as well"
	@echo "PYTHON=/path/to/python chooses the Python (3.11 or newer) that an environment is made with."

setup: $(STAMP)

# Entry points hold the path of .venv, so a moved or copied one is made anew.
HERE := grep -qsF ' $(CURDIR)/$(VENV)' $(VENV)/pyvenv.cfg
ifneq ($(shell $(HERE) && echo here),here)
$(STAMP): force
endif

# A candidate is tried, not looked up: version managers leave commands that only say "not installed".
$(STAMP): setup.py pyproject.toml constraints.txt
	@if test -L $(VENV); then $(call fail,$(VENV) is a link and what it leads to would be emptied; remove the link); fi; \
	if $(HERE) && $(BIN)/python -c 'import pip' 2>/dev/null; then exit 0; fi; \
	for python in $(or $(PYTHON),python3.11 python3.12 python3.13 python3); do \
	    $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue; \
	    found=$$python; \
	    if $$python -c 'import venv, ensurepip' 2>/dev/null; then chosen=$$python; break; fi; \
	done; \
	test "$$found" || $(call fail,no Python 3.11 or newer found$(PYTHON:%= as %); install one or give its path: \
	make setup PYTHON=/path/to/python); \
	test "$$chosen" || $(call fail,$$found cannot create virtual environments; install its venv module (Debian and \
	Ubuntu: apt-get install python3-venv)); \
	echo "creating $(VENV) with $$($$chosen --version)"; \
	$$chosen -m venv --clear $(VENV) || $(call fail,$(VENV) could not be created for the reason above)
	@echo "installing the packages of setup.py into $(VENV): takes a few minutes and about 6 GB the first time"
	@$(BIN)/python -m pip install $(QUIET) --disable-pip-version-check -c constraints.txt -e '.[dev]' || \
	$(call fail,pip could not install the packages for the reason above; check the network and the disk space and run \
	make setup again)
	@touch $@

demo: $(STAMP)
	@$(BIN)/sgmim demo

demo-compare: $(STAMP)
	@$(BIN)/sgmim demo --compare

# mypy follows no import hook, so it reads the package laid out as it is installed: through links.
check: $(STAMP)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	@rm -rf $(LINKS) && mkdir -p $(LINKS)/sgmim_fast
	@ln -s $(addprefix ../../../,$(wildcard sgmim_fast/*) kernels) $(LINKS)/sgmim_fast/
	cd $(LINKS) && ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p sgmim_fast
	$(BIN)/python -m pytest tests/test_import_direction.py

# One file's tests stay in one process, where they share what they built, and files start in the order of conftest.py;
# one thread each keeps the cores free.
SHARED_OUT := -n $$(nproc) --maxprocesses 8 --dist loadfile --no-loadscope-reorder

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(SHARED_OUT)

# Tests and benchmarks of kernels need no installation: importing the package benchmarks makes the kernels importable.
KERNEL_TESTS = $(shell grep -l kernel_cases tests/test_*.py) tests/test_ahead_of_time.py

$(OLD_STAMP): $(OLD_PINS) $(if $(PYTHON),,| $(STAMP))
	@echo "installing PyTorch and Triton of $(OLD_PINS) into $(OLD_VENV): about 5 GB"
	@$(or $(PYTHON),$(BIN)/python) -m venv --clear $(OLD_VENV)
	@$(OLD_VENV)/bin/python -m pip install $(QUIET) --disable-pip-version-check -c $(OLD_PINS) \
	torch triton numpy pytest pytest-xdist hypothesis || \
	$(call fail,pip could not install the packages for the reason above; check the network and the disk space)
	@touch $@

test-triton-3.6: $(OLD_STAMP)
	OMP_NUM_THREADS=1 $(OLD_VENV)/bin/python -m pytest -p benchmarks $(SHARED_OUT) $(KERNEL_TESTS)

gpu-check: $(if $(PYTHON),,$(STAMP))
	@$(or $(PYTHON),$(BIN)/python) -m benchmarks.gpu_check $(RESULTS:%=--results %) $(if $(SLICE),--slice $(SLICE))

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis runs/demo runs/demo-simmim \
	scenes/demo scenes/demo-test
	find $(SOURCES) -name __pycache__ -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) $(OLD_VENV)
