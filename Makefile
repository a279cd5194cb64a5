# make               sets up .venv and builds the extension in the source tree. Every command below does so first, if needed
# make help          prints this list
# make test          the tests that are not marked slow, in two processes. ARGS go to pytest: make test ARGS="-k bn_act"
# make prove         the tests that are marked slow (CONTRIBUTING.md)
# make lint          ruff: rules and format
# make types         mypy
# make docs          builds the documentation's site; warnings are errors
# make bench         the benchmark suite. ARGS go to it: make bench ARGS="--quick"
# make wheel         builds and tests a wheel. TORCH=2.11 for another torch (and PYTHON_VERSION=3.12), TORCH=any: no extension
# make faults        mutation tests: inserts bugs into a copy of the tree, and tests have to fail. ARGS="cpu add_relu" selects
# make sanitize      the whole conformance suite on emulated CUDA kernels, with each sanitizer (docs/emulator.md)
# make gpu-report    compiles the GPU kernels for every architecture and writes docs/gpu-report.md
#
# Environment: PYTHON=python3.12 chooses the interpreter (3.10 to 3.13) of .venv. CNNKERN_CUDA=0 leaves the CUDA kernels out,
# CNNKERN_CUDA=1 insists on them (setup.py). CNNKERN_CPU=native builds for this machine's instruction set alone.

.PHONY: help setup test prove faults sanitize gpu-report bench lint types docs wheel
.DEFAULT_GOAL := setup

SUITABLE = -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1
ifdef PYTHON
SUITABLE_PYTHON = $(shell $(PYTHON) $(SUITABLE) && echo $(PYTHON))
ADVICE = PYTHON=$(PYTHON) does not run as Python 3.10 to 3.13: leave it out, or name another interpreter
else
SUITABLE_PYTHON = $(shell for p in python3 python3.13 python3.12 python3.11 python3.10; do \
	$$p $(SUITABLE) && echo $$p && break; done)
ADVICE = no Python 3.10 to 3.13 on the path: `apt-get install python3 python3-venv`, or PYTHON=/path/to/python3
endif
BOOTSTRAP = $(or $(SUITABLE_PYTHON),$(error cnnkern: $(ADVICE))) tools/bootstrap.py

help:
	@sed -n '/^$$/q; s/^# \{0,1\}//p' Makefile

setup:
	@$(BOOTSTRAP)

test: setup
	.venv/bin/python -m pytest -n 2 --dist worksteal -m "not slow" $(ARGS)

prove: setup
	.venv/bin/python -m pytest -n 2 --dist worksteal -m slow $(ARGS)

faults: setup
	PYTHONPATH=tests:. .venv/bin/python -m faults $(ARGS)

sanitize: setup
	EMULATOR_FULL=1 .venv/bin/python -m pytest tests/test_emulator.py tests/test_cpu_sanitizers.py -k test_battery $(ARGS)

gpu-report: setup
	PYTHONPATH=tests:. .venv/bin/python -m gpu_gate.report

# It needs the kernels that run on this machine alone
bench:
	@$(BOOTSTRAP) --bench
	.venv/bin/cnnkern bench $(ARGS)

lint:
	@$(BOOTSTRAP) --lint
	.venv/bin/ruff check
	.venv/bin/ruff format --check

types: setup
	.venv/bin/mypy
	.venv/bin/mypy tests/typed_use.py

docs: setup
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict

# ARGS=--quick does not compile the source distribution; TORCH=2.11 or TORCH=any: docs/install.md
wheel: setup
	.venv/bin/python tools/wheel.py $(if $(TORCH),$(if $(filter any,$(TORCH)),--pure,--torch $(TORCH))) \
		$(if $(PYTHON_VERSION),--python $(PYTHON_VERSION)) $(ARGS)
