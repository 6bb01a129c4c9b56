# make demo    set up, build, run the main job on embedded data, show a table
# make test    set up, build, run the tests
# The environment is .venv; PYTHON chooses the interpreter it is made from.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= demo_out

.PHONY: demo test lint bench gpu wheel build sanitize clean

# AUTO, ON or OFF; and for which GPUs, in CMake's words (none: those of the wheel)
CUDA ?= AUTO
CUDA_ARCHITECTURES ?=
# ALL, or NATIVE: CPU kernels for this machine's highest instruction level alone
CPU_LEVELS ?= ALL
OPTIONS = -DRECSPARSE_CPU_LEVELS=$(CPU_LEVELS) -DRECSPARSE_CUDA=$(CUDA) -DRECSPARSE_CUDA_ARCHITECTURES=$(CUDA_ARCHITECTURES)

# The demo runs on this machine's CPU: it waits for no other kernels.
demo: CUDA = OFF
demo: CPU_LEVELS = NATIVE
demo: build
	$(BIN)/python -m recsparse_kernels demo --out $(OUT)

# Where nvcc is found the tests' CUDA library is for one GPU: a third of the time to compile.
test: CUDA_ARCHITECTURES = 90a-real
test: TEST_MODULE = -DRECSPARSE_TESTS=ON
test: build $(VENV)/triton-oldest
	$(BIN)/python -m pytest

# The oldest Triton that we support, beside the environment's own: tests/aot compiles with both, and
# skips this one where it cannot be installed.
$(VENV)/triton-oldest: $(VENV)/ready
	-$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $@ triton==3.6.0

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' 'tests/native/cuda_on_cpu/*.h' 'tests/native/cuda_on_cpu/*.cpp' 'tests/native/cuda_on_cpu/*.cu')

bench: build
	$(BIN)/python -m pytest bench -o testpaths=bench -o python_files='bench_*.py' --benchmark-columns=median,iqr,rounds -s

# On a machine with a GPU: every case of the tests on it, then the GPU benches; under eight minutes.
gpu: build
	$(BIN)/python -m bench.gpu

wheel: $(VENV)/ready
	CMAKE_ARGS="$(CMAKE_ARGS) $(OPTIONS)" $(BIN)/pip wheel --no-build-isolation --no-deps --wheel-dir dist .

# The op tests under the address and undefined-behaviour sanitizers, on a copy of the package.
SANITIZE := build/sanitize
SANITIZE_TESTS ?= tests/ops
sanitize: $(VENV)/ready
	mkdir -p $(SANITIZE)/package
	cp -r recsparse_kernels $(SANITIZE)/package/
	$(BIN)/cmake -S . -B $(SANITIZE)/cmake -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python -DRECSPARSE_SANITIZE=ON \
		-DRECSPARSE_OUTPUT_DIR=$(CURDIR)/$(SANITIZE)/package/recsparse_kernels
	$(BIN)/cmake --build $(SANITIZE)/cmake --parallel
	cd $(SANITIZE)/package && \
		LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so) $$(gcc -print-file-name=libstdc++.so)" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
		$(CURDIR)/$(BIN)/python -m pytest -c $(CURDIR)/pyproject.toml --rootdir $(CURDIR) $(addprefix $(CURDIR)/,$(SANITIZE_TESTS))

build: $(VENV)/ready
	CMAKE_ARGS="$(CMAKE_ARGS) $(OPTIONS) $(TEST_MODULE)" $(BIN)/python setup.py --quiet build_ext --inplace

$(VENV)/ready: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

clean:
	rm -rf build build-* dist .venv recsparse_kernels/*.so
