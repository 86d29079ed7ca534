# make demo, make test: each does all of its set-up, from a fresh clone, in this folder only.
#
# Without torch >= 2.11 in $(PYTHON), a .venv is made here, with TORCH first: left to the other packages' needs, torch
# would be the newest there is, with CUDA libraries of several GB. A Python that has torch already (a GPU image, perhaps
# without network) is used as it is and nothing is installed into it; `make VENV=.venv ...` asks for the .venv anyway.
PYTHON ?= python3
TORCH ?= torch==2.13.0
HAS_TORCH := $(shell $(PYTHON) -c "from importlib.metadata import version as v; print(int(tuple(map(int, v('torch').split('.')[:2])) >= (2, 11)))" 2>/dev/null)
VENV ?= $(if $(filter 1,$(HAS_TORCH)),,.venv)
PY = $(if $(VENV),$(VENV)/bin/python,$(PYTHON))
PIP = $(PY) -m pip --disable-pip-version-check -q
CMAKE_CONFIGURE = cmake -S . -G "$$(command -v ninja >/dev/null && echo Ninja || echo Unix Makefiles)"
JOBS ?= $(shell nproc 2>/dev/null || echo 2)

NATIVE := CMakeLists.txt setup.py $(shell find csrc -type f -not -name '*.md')
CPP := $(shell find csrc tests/cpp bench/gpu -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
KIND := $(if $(VENV),venv,host)
NEEDS := transformers safetensors numpy rich matplotlib pytest hypothesis
READY := $(addsuffix /.ready,$(VENV))
ifneq ($(VENV),)
export PATH := $(abspath $(VENV)/bin):$(PATH)
endif

.PHONY: demo test test-long test-matrix test-vllm test-vllm-quick models bench lint style types format cpp-test cuda-check isa-check qemu-check wheel clean distclean

demo: build/.built-$(KIND)
	$(PY) -m kvselect demo

# Where pytest-xdist is (a .venv has it), on at most eight processes; each takes 1 to 2 GB.
IN_PARALLEL = $$($(PY) -c "import xdist; print('-n auto --maxprocesses 8')" 2>/dev/null)

test: build/.built-$(KIND)
	$(PY) -m pytest -q $(IN_PARALLEL)

# 10,000 random lives of a cache against transformers' own; minutes.
test-long: build/.built-$(KIND)
	KVSELECT_TEST_PROFILE=long $(PY) -m pytest -q tests/test_hf_cache_sequences.py

# The Hugging Face tests on the oldest and the newest torch and transformers that are supported, in
# environments under build/matrix (several GB: torch from PyPI brings CUDA). MATRIX=torch:transformers,...
MATRIX ?= 2.11.0:5.17.0,2.13.0:newest
test-matrix: build/.built-$(KIND)
	$(PY) tests/version_matrix.py --pairs $(MATRIX)

# kvselect inside vLLM's CPU build, in an environment of its own (3.5 GB), made once: docs/serving.md. VLLM=0.28.0: the older release that is tested. A process per file: an engine
# leaves things behind.
VLLM ?= 0.32.0
VLLM_TORCH ?= 2.13.0
VLLM_VENV = build/vllm-venv-$(VLLM)
test-vllm: $(VLLM_VENV)/.installed
	cd tests/serving && for file in test_*.py; do \
	    timeout 900 ../../$(VLLM_VENV)/bin/python -m pytest -q $$file || exit 1; done

# The part of it that CI has time for, once the environment is there.
test-vllm-quick: $(VLLM_VENV)/.installed
	cd tests/serving && for file in test_vllm.py test_vllm_cuda.py; do \
	    timeout 300 ../../$(VLLM_VENV)/bin/python -m pytest -q -m quick $$file || exit 1; done

$(VLLM_VENV)/.ready: tests/serving/vllm_environment.py
	$(PYTHON) tests/serving/vllm_environment.py $(VLLM_VENV) --vllm $(VLLM) --torch $(VLLM_TORCH)
	touch $@

$(VLLM_VENV)/.installed: $(VLLM_VENV)/.ready pyproject.toml $(NATIVE) $(shell find kvselect -name '*.py')
	KVSELECT_CUDA=off $(VLLM_VENV)/bin/python -m pip install -q --no-build-isolation --no-deps .
	touch $@

# docs/models.md: every architecture against every check, by running them.
models: build/.built-$(KIND)
	$(PY) tests/model_table.py

# The questions that bench/README.md lists, one script each; those of bench/gpu.sh and of vLLM stay with theirs.
bench: build/.built-$(KIND)
	@set -e; for script in $$(grep -oE 'bench/[a-z0-9_]+\.py' bench/README.md | sort -u | grep -vE 'gpu_report|model_step|vllm_decode'); do \
	    echo "== $$script"; $(PY) $$script; done

lint: style types

style: build/.tools-$(KIND)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	clang-format --dry-run -Werror $(CPP)

types: build/.tools-$(KIND)
	$(PY) -m mypy

format: build/.tools-$(KIND)
	$(PY) -m ruff check --fix-only .
	$(PY) -m ruff format .
	clang-format -i $(CPP)

# The torch-free kernels against plain loops, under the address and undefined-behaviour sanitizers.
cpp-test: $(READY)
	$(CMAKE_CONFIGURE) -B build/cpp-test -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_FLAGS_DEBUG="-O1 -g1" \
	    -DKVSELECT_MODULES=OFF -DKVSELECT_CPP_TESTS=ON -DKVSELECT_SANITIZE=ON -DKVSELECT_WERROR=ON
	cmake --build build/cpp-test --parallel $(JOBS)
	for part in $$(seq 0 $$(($(JOBS) - 1))); do echo --part $$part/$(JOBS); done \
	    | xargs -P $(JOBS) -L 1 build/cpp-test/tests/cpp/kvselect_tests

# Compiles and links every .cu for all architectures, then prints what each kernel takes; needs nvcc, but neither a GPU
# nor a CUDA build of torch.
cuda-check: $(READY)
	$(CMAKE_CONFIGURE) -B build/cuda-check -DPython3_EXECUTABLE="$$(command -v $(PY))" \
	    -DKVSELECT_CUDA=check -DKVSELECT_WERROR=ON
	cmake --build build/cuda-check --parallel $(JOBS) --target cuda_check
	@if [ -e build/cuda-check/modules/_C_cuda.abi3.so ]; then $(PY) tests/cuda_report.py build/cuda-check; fi

# What is compiled for one instruction set stays with it (tests/isa_check.py); needs objdump.
isa-check: build/.built-$(KIND)
	@objects=$$(find build/cmake-* -path '*kvselect_cpu.dir*' -name '*.o'); \
	test -n "$$objects" || { echo "isa-check: no object files under build/"; exit 1; }; \
	$(PY) tests/isa_check.py $$objects

# The built module on a CPU without AVX-512, if qemu can play one. (torch itself needs more than SSE4.)
qemu-check: build/.built-$(KIND)
	@if command -v qemu-x86_64 >/dev/null; then \
	    OMP_NUM_THREADS=1 qemu-x86_64 -cpu Haswell $(PY) -m pytest -q -p no:cacheprovider tests/test_merge_splits.py; \
	else echo "qemu-check: no qemu-x86_64 here, nothing checked"; fi

# A wheel, installed into a folder of its own and imported from there: package data and modules are inside it.
wheel: build/.built-$(KIND)
	rm -rf build/wheel build/wheel-site
	$(PIP) wheel --no-build-isolation --no-deps -w build/wheel .
	$(PIP) install --no-deps --target build/wheel-site build/wheel/kvselect-*.whl
	cd build/wheel-site && PYTHONPATH=. $(if $(VENV),$(abspath $(PY)),$(PY)) -c \
	    "import kvselect; assert 'wheel-site' in kvselect.__file__; print(kvselect.build_info())"
	test $$(ls build/wheel-site/kvselect/eval/models/*/model.safetensors | wc -l) -eq 3  # the embedded models

ifneq ($(VENV),)
$(READY):
	$(PYTHON) -m venv $(VENV)
	@echo "Installing $(TORCH) and the build tools into $(VENV)"
	$(PIP) install $(TORCH)
	$(PIP) install "setuptools>=77" "cmake>=3.24" ninja
	@touch $@
endif

build/.built-venv: $(READY) $(NATIVE) pyproject.toml
	@echo "Installing what kvselect needs, and building kvselect"
	$(PIP) install --no-build-isolation -e ".[test]"
	@mkdir -p build && touch $@

# CMake alone, beside the sources: needs no pip, no setuptools and no network.
build/.built-host: $(NATIVE)
	@$(PY) -c "import sys; from importlib.util import find_spec; \
	    missing = [m for m in '$(NEEDS)'.split() if not find_spec(m)]; \
	    missing and sys.exit('$(PY) has torch, so it is used as it is, but lacks: ' + ', '.join(missing) \
	    + '. Install these, or make a .venv: make VENV=.venv')"
	$(CMAKE_CONFIGURE) -B build/cmake-host -DPython3_EXECUTABLE="$$(command -v $(PY))" \
	    -DKVSELECT_OUTPUT_DIR="$(CURDIR)/kvselect" -DKVSELECT_CUDA=$(or $(KVSELECT_CUDA),auto)
	cmake --build build/cmake-host --parallel $(JOBS)
	@touch $@

build/.tools-venv: build/.built-venv
	$(PIP) install --no-build-isolation -e ".[dev]"
	@touch $@

build/.tools-host:
	$(PY) -c "import mypy, ruff"
	@mkdir -p build && touch $@

clean:
	rm -rf build *.egg-info kvselect/*.abi3.so .mypy_cache .pytest_cache .ruff_cache .hypothesis

distclean: clean
	rm -rf .venv
