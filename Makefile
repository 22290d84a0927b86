# make setup   .venv with everything that needs no GPU
# make demo    train, evaluate and report, small (two CPU cores, 6 to 11 minutes)
# make demo-sglang   the same training, sampling from two real SGLang servers on the same cores
# make test    lint, types, and the tests that need no GPU, SGLang server or Slurm (two CPU cores, 8 minutes)
# make test-slow     the tests that make test leaves out because they take long
# make test-sglang   rollouts from the real SGLang server, in an environment of its own (3.3 GB)
# make test-null-gpu   the host's side of the GPU path, on a simulated GPU; an environment of its own (5 GB)
# make test-python312  tests of models, layouts, checkpoints and kernels in that environment: Python 3.12, on a CPU
# make test-slurm    runs on a real Slurm of five nodes on this host; installs it as root on Debian
#
# Downloaded wheels are kept in $(WHEELS), so that another checkout installs without a network.

PYTHON ?= python3
GPU_PYTHON ?= python3
WHEELS ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/rlef-mega/wheels
VENV := .venv
BIN := $(VENV)/bin
# More threads than cores cost time, and tests start processes of their own.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM := false
export HF_HUB_OFFLINE := 1

.PHONY: setup setup-sglang setup-gpu setup-sglang-gpu demo demo-sglang test lint test-slow test-sglang test-slurm test-null-gpu test-python312 test-gpu check-gpu bench bench-gpu clean

setup: $(VENV)/installed

$(VENV)/installed: pyproject.toml requirements-cpu.txt scripts/install.sh
	sh scripts/install.sh "$(PYTHON)" "$(VENV)" "$(WHEELS)"
	touch "$@"

# The SGLang server's own environment, with pinned packages of its own.
setup-sglang: .venv-sglang/installed

.venv-sglang/installed: requirements-sglang-cpu.txt scripts/install.sh
	[ ! -e .venv-sglang/installed-gpu ] || { echo "first remove .venv-sglang, which is for GPUs"; exit 1; }
	sh scripts/install.sh "$(PYTHON)" .venv-sglang "$(WHEELS)" requirements-sglang-cpu.txt
	touch "$@"

# The server for GPUs (12 GB), in the same place, where recipes look for it.
setup-sglang-gpu: .venv-sglang/installed-gpu

.venv-sglang/installed-gpu: requirements-sglang-gpu.txt scripts/install.sh
	[ ! -e .venv-sglang/installed ] || { echo "first remove .venv-sglang, which is for a CPU"; exit 1; }
	sh scripts/install.sh "$(PYTHON)" .venv-sglang "$(WHEELS)-gpu" requirements-sglang-gpu.txt
	touch "$@"

# The trainer with a CUDA build of PyTorch. Its wheels are kept apart: pip cannot tell it from a CPU build of the same version.
setup-gpu: .venv-gpu/installed

.venv-gpu/installed: pyproject.toml requirements-gpu.txt scripts/install.sh
	sh scripts/install.sh "$(PYTHON)" .venv-gpu "$(WHEELS)-gpu" requirements-gpu.txt
	touch "$@"

demo: setup
	"$(BIN)/rlef" demo

demo-sglang: setup setup-sglang
	"$(BIN)/rlef" sft demo_base
	"$(BIN)/rlef" train tiny_sglang_cpu --serve
	"$(BIN)/rlef" view runs/tiny-sglang

lint: setup
	"$(BIN)/ruff" check .
	"$(BIN)/ruff" format --check .
	"$(BIN)/mypy" --num-workers 2 rlef_mega kernels/rlef_kernels sandbox/rlef_sandbox

# Tests run in parallel, in the order of their folders: the sandbox's many short files come last, so that all workers end
# together. There is one worker more than cores, because many tests wait for processes. Tests that measure time run alone
# afterwards; pytest gets only the files that contain some.
LOCAL := not gpu and not null_gpu and not sglang and not slurm
test: lint
	"$(BIN)/python" -m pytest -m "$(LOCAL) and not slow and not timing" --numprocesses $$(($$(nproc) + 1)) --dist loadfile \
		--no-loadscope-reorder --durations=10
	"$(BIN)/python" -m pytest -m "$(LOCAL) and not slow and timing" --durations=5 $$(grep -rl "mark\.timing" tests --include="*.py")

test-slow: setup
	"$(BIN)/python" -m pytest -m "$(LOCAL) and slow" --durations=10

# SGLANG_TESTS="sglang and not slow" runs only those that start the servers once.
SGLANG_TESTS ?= sglang
test-sglang: setup setup-sglang
	"$(BIN)/python" -m pytest -m "$(SGLANG_TESTS)" tests/sglang -rs --durations=10

# .venv-gpu needs Python 3.12: add PYTHON=python3.12 if python3 is another version.
test-null-gpu: setup-gpu
	.venv-gpu/bin/python -m tests.null_gpu.launch --gpus 2 -- \
		.venv-gpu/bin/python -m pytest -m "null_gpu or gpu" tests/null_gpu tests/kernels/device --durations=10

# On a CPU, what depends most on Python, PyTorch, Triton and Megatron, with the versions of requirements-gpu.txt
test-python312: setup-gpu
	.venv-gpu/bin/python -m pytest -m "$(LOCAL) and not slow and not timing" --numprocesses auto --dist loadfile \
		tests/rlef_mega/megatron tests/kernels --durations=5

test-slurm: setup
	sh scripts/install_slurm.sh
	"$(BIN)/python" -m pytest -m slurm tests/slurm -rs --durations=10

# .venv has a CPU build of PyTorch: GPU_PYTHON is the Python of an environment with a CUDA build, Triton and pytest.
test-gpu:
	"$(GPU_PYTHON)" -m pytest -m gpu tests/kernels/device tests/kernels/test_at_size.py tests/kernels/test_sanitizer.py

# What works on one GPU, and how fast, in twelve minutes (docs/gpu_day.md): CHECK="OUT --wheels FOLDER" and other options
CHECK ?= runs/check_gpu
check-gpu:
	"$(GPU_PYTHON)" -m rlef_mega.check_gpu.command $(CHECK)

# Kernels and a slice of the 8B model, and those peers of benchmarks/requirements-kernels.txt that are installed: three
# commands, each of which begins no new measurement after MINUTES
MINUTES ?= 6
bench-gpu:
	"$(GPU_PYTHON)" -m rlef_mega.cli bench kernels --minutes $(MINUTES) --json benchmarks/results/kernels.json
	"$(GPU_PYTHON)" -m rlef_mega.cli bench slice llama31_8b --minutes $(MINUTES) --json benchmarks/results/train_slice.json
	"$(GPU_PYTHON)" benchmarks/experiments/slice_against_hf.py llama31_8b --minutes $(MINUTES) --json benchmarks/results/slice_against_hf.json

bench: setup
	"$(BIN)/rlef" bench train --json benchmarks/results/train.json
	"$(BIN)/rlef" bench slice demo --json benchmarks/results/slice_demo.json
	"$(BIN)/rlef" bench rollout --json benchmarks/results/rollout.json

clean:
	rm -rf "$(VENV)" .venv-sglang .venv-gpu runs
