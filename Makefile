# make demo    set up, build, run the main job on embedded data, show a table
# make test    set up, build, run the tests
# The environment is .venv; PYTHON chooses the interpreter it is made from.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= demo_out

.PHONY: demo test lint bench wheel build sanitize clean

demo: build
	$(BIN)/python -m recsparse_kernels demo --out $(OUT)

test: build
	$(BIN)/python -m pytest

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp')

bench: build
	$(BIN)/python -m pytest bench -o testpaths=bench -o python_files='bench_*.py' --benchmark-columns=median,iqr,rounds -s

wheel: $(VENV)/ready
	$(BIN)/pip wheel --no-build-isolation --no-deps --wheel-dir dist .

build: $(VENV)/ready
	CMAKE_ARGS="$(CMAKE_ARGS)" $(BIN)/python setup.py --quiet build_ext --inplace

$(VENV)/ready: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

clean:
	rm -rf build build-* dist .venv recsparse_kernels/*.so
