# Everything happens in virtual environments below this folder. Works with GNU make 3.81, which macOS has.
PYTHON ?= python3
MODEL ?= smollm2
PROMPT ?= Why is the sky blue?
# They reach the shell as variables, so that a prompt may hold quotes.
export MODEL PROMPT
# What pytest runs, such as TESTS=tests/gguf; all of tests/ when empty.
TESTS ?=
# How long the soak takes.
MINUTES ?= 10

VENV = .venv
VENV_JAX050 = .venv-jax050
PIP = -m pip --disable-pip-version-check --quiet
PYTEST = -m pytest $(TESTS)
# What the CPU kernels are built from: they are built when irkit is installed.
KERNELS = CMakeLists.txt .editable/CMakeLists.txt $(wildcard irkit/kernels/cpu/src/*)
NATIVE_TESTS = cmake -S . -DIRKIT_NATIVE_TESTS=ON

.DELETE_ON_ERROR:
.PHONY: help run test test-slow soak test-jax050 test-arm sanitize docs clean

help:
	@echo "make run          install irkit into $(VENV), fetch $$MODEL and ask it: $$PROMPT"
	@echo "make test         lint, type check and test; notebooks in a browser too, where Chromium is (Debian: chromium)"
	@echo "make test-slow    the long tests that 'make test' leaves out"
	@echo "make soak         a server under load for MINUTES=$(MINUTES): is its memory flat, is no slot lost"
	@echo "make test-jax050  the tests on jax 0.5.0, the oldest supported and the one Apple's jax-metal needs"
	@echo "make test-arm     the kernels' own tests on emulated Arm (needs cmake, aarch64-linux-gnu-g++, qemu-aarch64)"
	@echo "make sanitize     the same under the address, undefined behaviour and thread sanitizers (needs cmake)"
	@echo "make docs         build the documentation into site/"
	@echo "make clean        remove what these made, virtual environments included"
	@echo "Variables: PYTHON=$(PYTHON) MODEL=$$MODEL PROMPT='...' TESTS=tests/browser"

run: $(VENV)/installed
	@$(VENV)/bin/irkit run "$$MODEL" "$$PROMPT"

test: $(VENV)/installed-dev
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/pyright
	$(VENV)/bin/python $(PYTEST)

test-slow: $(VENV)/installed-slow
	$(VENV)/bin/python -m pytest -m slow $(TESTS)

soak: $(VENV)/installed-dev
	$(VENV)/bin/python tests/server/soak.py --minutes $(MINUTES)

test-jax050: $(VENV_JAX050)/installed
	$(VENV_JAX050)/bin/python $(PYTEST)

test-arm:
	$(NATIVE_TESTS) -B build/arm -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
	  -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DCMAKE_EXE_LINKER_FLAGS=-static \
	  -DCMAKE_CROSSCOMPILING_EMULATOR=qemu-aarch64
	cmake --build build/arm --parallel 2
	ctest --test-dir build/arm --output-on-failure

sanitize:
	$(NATIVE_TESTS) -B build/sanitize-address -DIRKIT_SANITIZE=address,undefined
	$(NATIVE_TESTS) -B build/sanitize-thread -DIRKIT_SANITIZE=thread
	cmake --build build/sanitize-address --parallel 2
	cmake --build build/sanitize-thread --parallel 2
	ctest --test-dir build/sanitize-address --output-on-failure
	ctest --test-dir build/sanitize-thread --output-on-failure

docs: $(VENV)/installed-dev
	$(VENV)/bin/mkdocs build --strict

clean:
	rm -rf $(VENV) $(VENV_JAX050) build dist site .pytest_cache .ruff_cache .hypothesis
	find .editable -mindepth 1 ! -name CMakeLists.txt -prune -exec rm -rf {} +
	rm -f irkit/kernels/cpu/libirkit_kernels.*
	find irkit tests -name __pycache__ -prune -exec rm -rf {} +

# The files named installed say that an installation was finished, and from which pyproject.toml and C++ sources.
$(VENV)/installed: pyproject.toml $(KERNELS) | $(VENV)/bin/python
	@echo "Installing irkit into $(VENV) (once; it builds the CPU kernels) ..."
	$(VENV)/bin/python $(PIP) install -e .
	@touch $@

$(VENV)/installed-dev: pyproject.toml $(KERNELS) | $(VENV)/bin/python
	@echo "Installing irkit and its development tools into $(VENV) (once) ..."
	IRKIT_KERNELS_REQUIRED=1 $(VENV)/bin/python $(PIP) install -e '.[dev]'
	@touch $(VENV)/installed $@

# Replicas are tested under Ray, which is large, in the slow tests alone. irkit is there: this adds what the extra needs.
$(VENV)/installed-slow: $(VENV)/installed-dev
	@echo "Installing Ray into $(VENV) (once) ..."
	$(VENV)/bin/python $(PIP) install 'irkit[ray]'
	@touch $@

$(VENV_JAX050)/installed: pyproject.toml $(KERNELS) | $(VENV_JAX050)/bin/python
	@echo "Installing irkit with jax 0.5.0 into $(VENV_JAX050) (once) ..."
	IRKIT_KERNELS_REQUIRED=1 $(VENV_JAX050)/bin/python $(PIP) install jax==0.5.0 jaxlib==0.5.0 -e '.[dev]'
	@touch $@

$(VENV)/bin/python $(VENV_JAX050)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "irkit needs Python 3.11 or later, and $(PYTHON) is not that; name another: make PYTHON=python3.12 ..." >&2; \
	  exit 1; }
	$(PYTHON) -m venv $(@:/bin/python=)
