# `make help` lists the targets. Each makes .venv first, from the versions in constraints.txt.

PYTHON ?= python3
TORCH_FLAGS ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
NATIVE := src/stepquant/runtime/ops/native
KERNELS := $(NATIVE)/_kernels.$(if $(filter Darwin,$(shell uname)),dylib,so)

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-wheel sanitize fuzz lint format docs clean

help:
	@echo "make demo       quantize the embedded model, sample it, compare it with the float model"
	@echo "make test       the tests, without the slow ones"
	@echo "make test-slow  the slow tests"
	@echo "make sanitize   the tests of the native kernels, compiled with the compiler's sanitizers;"
	@echo "                SANITIZE=--quick leaves the emulated instruction sets out"
	@echo "make test-wheel  build the wheel, install it into an empty environment, quantize and sample"
	@echo "make fuzz       damaged and hostile files of every kind that stepquant reads, about a minute"
	@echo "make lint       ruff, mypy, and the order of the rooms"
	@echo "make format     let ruff sort imports and format"
	@echo "make docs       draw the figures, fill the tables in, and build the site in site/"
	@echo "make clean      remove what the above wrote, except $(VENV)"
	@echo
	@echo "PYTHON       a Python from 3.10 to 3.13 (now: $(PYTHON))"
	@echo "TORCH_FLAGS  pip options for installing torch alone. On Linux the default build of torch"
	@echo "             brings several GB of CUDA libraries; for the CPU build name its package index:"
	@echo "             make demo TORCH_FLAGS=\"--index-url URL\""

# torch comes first and alone, so that TORCH_FLAGS can choose its build; the second command keeps
# that build and fetches everything else from where pip is set to look.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; (3, 10) <= v < (3, 14) or sys.exit( \
		"$(PYTHON) is Python %d.%d: expected 3.10 to 3.13; set PYTHON=" % v[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --no-deps $(TORCH_FLAGS) -c constraints.txt torch
	$(BIN)/pip install -c constraints.txt -e ".[evaluate,dev]"
	@touch $@

# The installation compiles the native kernels; this does it again when their sources are newer, as
# the package refuses a library of other sources, and is slow without one. No compiler is no failure.
$(KERNELS): $(wildcard $(NATIVE)/*.cpp $(NATIVE)/*.h $(NATIVE)/build.py) | $(STAMP)
	@$(BIN)/python -m stepquant.runtime.ops.native || true

demo: $(STAMP) $(KERNELS)
	rm -rf demo
	$(BIN)/stepquant demo --out demo

# Files side by side, each process with one thread: the tests' tensors are tiny.
test: $(STAMP) $(KERNELS)
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses=auto --maxprocesses=8 --dist=loadfile

test-slow: $(STAMP) $(KERNELS)
	$(BIN)/pytest -m slow

# Each case ends with the sound result or with one sentence. FUZZ="--seed 1 --times 20" for more.
fuzz: $(STAMP) $(KERNELS)
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz $(FUZZ)

# What a user gets: no checkout, no development packages. The folder of the run is empty, too.
test-wheel: $(STAMP)
	rm -rf build/wheel
	mkdir -p build/wheel/run
	$(BIN)/pip wheel --no-deps -w build/wheel .
	$(PYTHON) -m venv build/wheel/venv
	build/wheel/venv/bin/pip install --no-deps $(TORCH_FLAGS) -c constraints.txt torch
	build/wheel/venv/bin/pip install -c constraints.txt build/wheel/*.whl
	cd build/wheel/run && ../venv/bin/stepquant quantize builtin:fashion-ddpm --recipe minmax \
		--steps 4 --set calibration.trajectories=2 --out packed
	cd build/wheel/run && ../venv/bin/stepquant sample packed --num 2 --steps 2 --grid grid.png
	test -s build/wheel/run/grid.png

sanitize: $(STAMP)
	$(BIN)/python tests/helpers/sanitized_kernels.py build/sanitize $(SANITIZE)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff check --fix --select I .
	$(BIN)/ruff format .

# The tools for the documentation are an extra of their own; most work on the code needs none of them.
$(VENV)/.docs: $(STAMP)
	$(BIN)/pip install -c constraints.txt -e ".[docs]"
	@touch $@

docs: $(VENV)/.docs
	$(BIN)/python benchmarks/doc_tables.py
	$(BIN)/python benchmarks/figures.py
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(NATIVE)/_kernels.* build dist demo site .hypothesis .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find src tests benchmarks training -type d -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
