# One environment for everything, set up once; it is brought up to date when a file that describes it changes.
#
#   make demo     trains a small Performer on real text for about three minutes, saves it and loads it elsewhere
#   make test     checks style, then runs every test
#   make lint     the style checks alone; `make format` applies what they ask for
#   make bench    speed and memory beside the peer libraries
#   make matrix   runs what docs/matrix.md is about and writes it anew
#   make compat   a smoke test of every head at both ends of the supported version ranges
#   make kernels  compiles every kernel that has changed for each kind of GPU and writes the tables of their resources
#   make compiled every test of kernels on the code compiled for sm_80 and sm_90, without a GPU (long)
#   make gpu      on a machine with a GPU: tests of models and kernels, then benchmarks, rows to docs/benchmarks/gpu.csv

PYTHON ?= python3
VENV   := .venv
RUN    := $(VENV)/bin/python
STAMP  := $(VENV)/.installed
# The peer libraries are large and only benchmarks need them all.
PEERS  := $(VENV)/.peers-installed
# constraints.txt pins builds for the CPU: a GPU machine has its own Python with torch, Triton and pytest.
GPU_PYTHON ?= python3

.PHONY: demo test lint format bench matrix compat kernels compiled gpu
.DELETE_ON_ERROR:

demo: $(STAMP)
	$(RUN) scripts/demo.py

test: lint
	$(RUN) -m pytest -n 2 --dist worksteal

lint: $(STAMP)
	$(RUN) -m ruff format --check
	$(RUN) -m ruff check

format: $(STAMP)
	$(RUN) -m ruff check --fix
	$(RUN) -m ruff format

bench: $(PEERS)
	$(RUN) scripts/benchmark.py

matrix: $(STAMP)
	$(RUN) -m pytest -n 2 -m matrix --write-matrix

compat: $(STAMP)
	$(RUN) scripts/compat.py

KERNEL_TABLE := docs/benchmarks/kernel_resources
kernels: $(STAMP)
	$(RUN) scripts/kernel_report.py --known $(KERNEL_TABLE).csv --csv $(KERNEL_TABLE).csv
	$(RUN) scripts/kernel_report.py --triton 3.6.0 --hot-only --ignore-spills --targets sm_90 \
		--known $(KERNEL_TABLE)_oldest_triton.csv --csv $(KERNEL_TABLE)_oldest_triton.csv

compiled: $(STAMP)
	HF_EFFICIENT_COMPILED_FOR=sm_80 $(RUN) -m pytest -n 2 --dist worksteal tests/test_*_triton*.py
	HF_EFFICIENT_COMPILED_FOR=sm_90 $(RUN) -m pytest -n 2 --dist worksteal tests/test_*_triton*.py

gpu:
	$(GPU_PYTHON) -m pytest -n 8 --dist worksteal tests/test_models_gpu.py
	$(GPU_PYTHON) scripts/benchmark.py --device cuda

$(STAMP): pyproject.toml constraints.txt
	test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --constraint constraints.txt --editable '.[dev]'
	touch $@

$(PEERS): $(STAMP)
	$(RUN) -m pip install --constraint constraints.txt --editable '.[peers]'
	touch $@
