# make demo    install, then generate, train, evaluate and report on a sample set
# make test    install with the test tools, then run the tests
# make lint    ruff and mypy
# make bench   time predictions
# make kernel-report  compile every GPU kernel and print registers, spills, shared memory; needs no GPU
# make gpu-check  every operator's tests and benchmarks on this machine's GPU, and whole predictions, step by step, without
#              a network; WHEEL=FILE takes libraries built elsewhere. Without a GPU it runs what can be run
# make gpu-peers  predictions on this machine's GPU beside PyTorch and torch.compile, which takes minutes to compile;
#              goes on where it was stopped
# make gpu-sanitize  the operators' tests on this machine's GPU under compute-sanitizer's memcheck, racecheck, initcheck and
#              synccheck, 15 minutes each at most; after gpu-check, which builds what is tested. OPTIONS='-k quantile' chooses
# make sanitize  build the CPU library with AddressSanitizer and UndefinedBehaviorSanitizer (GCC) beside the normal one,
#              and run the operators' tests with it
# make fuzz-kernels  the CUDA C++ kernels in the emulator over many drawn shapes, others every time; half an hour and more;
#              EXAMPLES=25 times as many as in the tests
# make kill    kill saving, training and predicting at 100 random moments each (KILLS), and look at what is left
# make soak    20,000 predictions (COUNT) through every entry point, bad images among them; memory, files and threads must stay
# make fuzz    images, files of weights, and arrays, drawn by atheris where it can be installed; 600 SECONDS each
# make clean   remove what was built (the environment stays, and is completed by the next make)
#
# Settings, on the command line or in the environment:
#   PYTHON                       interpreter that creates the environment
#   VENV                         where the environment is
#   TORCH                        requirement for PyTorch in a new environment, such as 'torch==2.13.0'
#   EFFICIENTAD_FAST_BUILD       auto, none, cpu or cuda; here by default cpu where there is no GPU, else auto
#   EFFICIENTAD_FAST_CUDA_ARCHS  architectures of the CUDA library
#   EFFICIENTAD_FAST_LINEINFO    1: the CUDA library knows lines of its sources, for gpu-sanitize and profilers

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch>=2.11
EFFICIENTAD_FAST_BUILD ?= $(if $(wildcard /dev/nvidia[0-9]* /dev/dxg),auto,cpu)
EFFICIENTAD_FAST_CUDA_ARCHS ?=
EFFICIENTAD_FAST_LINEINFO ?=
export EFFICIENTAD_FAST_BUILD EFFICIENTAD_FAST_CUDA_ARCHS EFFICIENTAD_FAST_LINEINFO

BIN := $(VENV)/bin
# Compiling every module of PyTorch ahead takes longer than compiling those that are used when they are.
INSTALL := $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-compile
# An environment is finished when these exist; each is written last.
TOOLS := $(VENV)/.tools
PACKAGE := $(VENV)/.package
TESTS := $(VENV)/.tests
SETTINGS := $(VENV)/.settings
BUILD_INPUTS := setup.py build_backend.py pyproject.toml efficientad_fast/ops/schemas.inc \
                $(shell find csrc -type f)

.PHONY: help demo test lint bench kernel-report gpu-check gpu-peers gpu-sanitize sanitize fuzz-kernels kill soak fuzz clean FORCE

help:
	@sed -n 's/^# \{0,1\}//p; /^$$/q' Makefile

demo: $(PACKAGE)
	$(BIN)/efficientad-fast demo

test: $(TESTS)
	$(BIN)/python -m pytest

lint: $(TESTS)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

bench: $(TESTS)
	$(BIN)/python -m pytest benchmarks --benchmark-only

kernel-report: $(TESTS)
	$(BIN)/python -m benchmarks.kernel_report --check

# A machine with a GPU may have PyTorch and the test tools in its own Python, and nowhere to get them from.
FIND_PYTHON = if [ ! -e $(TESTS) ] && $(PYTHON) -c 'import torch, pytest, pytest_benchmark, hypothesis' 2> /dev/null; then \
	  python=$(PYTHON); \
	else \
	  $(MAKE) $(TESTS); python=$(BIN)/python; \
	fi

gpu-check:
	@$(FIND_PYTHON); set -x; $$python -m benchmarks.gpu_check $(if $(WHEEL),--wheel $(WHEEL))

gpu-peers:
	@$(FIND_PYTHON); set -x; $$python -m benchmarks.gpu_peers

gpu-sanitize:
	@$(FIND_PYTHON); set -x; $$python -m benchmarks.gpu_sanitize $(OPTIONS)

# What is preloaded must come before all that allocates or throws. Leaks are not looked for: Python and PyTorch keep
# memory until the end by design. pytest must not hold back what a process says that ends here.
SANITIZED := $(CURDIR)/build/sanitize
SANITIZED_TESTS := $(addprefix tests/test_,operators.py convolutions.py winograd.py autoencoder.py native.py \
                     preprocess.py quantile.py maps.py plan.py operator_plan.py detector.py)

sanitize: $(TESTS)
	EFFICIENTAD_FAST_BUILD=cpu EFFICIENTAD_FAST_SANITIZE=address,undefined,float-cast-overflow $(BIN)/python setup.py \
	  --quiet build_ext --build-temp $(SANITIZED) --build-lib $(SANITIZED) build_info --build-lib $(SANITIZED)
	cxx=$${CXX:-c++}; \
	LD_PRELOAD="$$($$cxx -print-file-name=libasan.so) $$($$cxx -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTEST_ADDOPTS='--capture=sys -p no:faulthandler' \
	EFFICIENTAD_FAST_LIBRARIES=$(SANITIZED)/efficientad_fast \
	  $(BIN)/python -m pytest -q -k 'not cpu-reference' $(SANITIZED_TESTS)

EXAMPLES ?= 25

fuzz-kernels: $(TESTS)
	EFFICIENTAD_FAST_EXAMPLES=$(EXAMPLES) $(BIN)/python -m pytest -q -k drawn_shapes -p no:cacheprovider \
	  --hypothesis-seed=$$RANDOM tests/test_cuda_operators.py

KILLS ?= 100

kill: $(TESTS)
	EFFICIENTAD_FAST_KILLS=$(KILLS) $(BIN)/python -m pytest -q -k kill_9 tests/test_results.py

COUNT ?= 20000

soak: $(TESTS)
	$(BIN)/python -m tests.soak --count $(COUNT)

SECONDS ?= 600

# Without atheris, which has no build for some systems, the same targets take mutations drawn at random.
fuzz: $(TESTS)
	$(INSTALL) atheris || echo "atheris cannot be installed here"
	for target in image weights array; do $(BIN)/python -m tests.fuzz $$target --seconds $(SECONDS); done

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	rm -f efficientad_fast/*.so efficientad_fast/build_info.json $(PACKAGE) $(TESTS)
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(TOOLS):
	@echo "== environment $(VENV) with $(TORCH)"
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) '$(TORCH)' ninja pybind11 'setuptools>=77'
	@touch $@

BUILD_SETTINGS = $(EFFICIENTAD_FAST_BUILD) $(EFFICIENTAD_FAST_CUDA_ARCHS) $(EFFICIENTAD_FAST_LINEINFO)

# Rewritten only when a setting changed, so that another kind of build replaces the one that is there.
$(SETTINGS): $(TOOLS) FORCE
	@echo '$(BUILD_SETTINGS)' | cmp --silent - $@ || echo '$(BUILD_SETTINGS)' > $@

# With the test tools there is nothing left that the package alone would need.
$(PACKAGE) $(TESTS): $(SETTINGS) $(BUILD_INPUTS)
	@echo "== efficientad_fast$(EXTRAS), EFFICIENTAD_FAST_BUILD=$(EFFICIENTAD_FAST_BUILD)"
	@rm -f $(PACKAGE) $(TESTS)
	$(INSTALL) --no-build-isolation -e '.$(EXTRAS)'
	@touch $(PACKAGE) $@

$(TESTS): EXTRAS := [test]
